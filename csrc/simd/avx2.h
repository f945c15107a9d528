/* avx2.h: the vocabulary in AVX2, FMA and F16C words, 8 floats a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f32.h"

enum { LANES = 8, ROW_TILE = 24, FEW_ROWS = 12 }; /* 9 to 12 rows would fill 16 lanes */
enum {
    ROW_VECTORS = 3,
    COLUMNS = 4,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 1,
    DOT_ROWS = 2
}; /* blocks that fit the registers */
enum { OWN_ALONE = 2, NARROW_ALONE = 0 }; /* rows that take keys one by one: see dot_keys */

typedef __m256 vec;
typedef __m256 mask;

static inline vec vset(real x) { return _mm256_set1_ps(x); }
static inline vec viota(void) { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vec vload(const real *p) { return _mm256_loadu_ps(p); }
static inline vec vload_n(const real *p, int n) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
static inline void vstore(real *p, vec x) { _mm256_storeu_ps(p, x); }

static inline vec vadd(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec vsub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec vmul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline mask veq(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vec vselect(mask m, vec a, vec b) { return _mm256_blendv_ps(b, a, m); }

static inline vec vzip_low(vec a, vec b) { /* a0 b0 a1 b1 ...: the lower half of both */
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
static inline vec vzip_high(vec a, vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

/* A vector of int8 or of halves from and to memory of any alignment; stores round to nearest even. */
static inline vec vload_int8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }
static inline vec vload_float16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline vec vload_bfloat16(const void *p) { /* each half above two bytes of 0 */
    __m256i to = _mm256_setr_epi32(0x01008080, 0x03028080, 0x05048080, 0x07068080, /* the lower four in one lane */
                                   0x09088080, 0x0b0a8080, 0x0d0c8080, 0x0f0e8080);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(p)), to));
}
static inline void vstore_float16(void *p, vec x) {
    _mm_storeu_si128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void vstore_bfloat16(void *p, vec x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    __m256i kept = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    __m256i high = _mm256_srli_epi32(kept, 16), packed = _mm256_packus_epi32(high, high);
    _mm_storeu_si128(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0))));
}
