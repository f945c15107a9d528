/* avx512.h: the vocabulary in AVX-512F/DQ/VL words, 16 floats a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f32.h"

enum { LANES = 16, ROW_TILE = 48, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 8,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 2,
    DOT_ROWS = 4
}; /* blocks that fit the registers */
enum { OWN_ALONE = 8, NARROW_ALONE = 2 }; /* rows that take keys one by one: see dot_keys */

typedef __m512 vec;
typedef __mmask16 mask;

static inline vec vset(real x) { return _mm512_set1_ps(x); }
static inline vec viota(void) { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
static inline vec vload(const real *p) { return _mm512_loadu_ps(p); }
static inline vec vload_n(const real *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p); }
static inline void vstore(real *p, vec x) { _mm512_storeu_ps(p, x); }

static inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec vsub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline mask veq(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vec vselect(mask m, vec a, vec b) { return _mm512_mask_blend_ps(m, b, a); }

static inline vec vzip_low(vec a, vec b) { /* a0 b0 a1 b1 ...: the lower half of both */
    __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, from, b);
}
static inline vec vzip_high(vec a, vec b) {
    __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, from, b);
}

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}

static inline vec vsum_pairs(vec a, vec b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    __m512d ab = _mm512_castps_pd(vsum_pairs(a, b)), cd = _mm512_castps_pd(vsum_pairs(c, d));
    vec fours = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    __m256 twos = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
}

/* A vector of int8 or of halves from and to memory of any alignment; stores round to nearest even. */
static inline vec vload_int8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }
static inline vec vload_float16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline vec vload_bfloat16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
static inline void vstore_float16(void *p, vec x) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void vstore_bfloat16(void *p, vec x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
