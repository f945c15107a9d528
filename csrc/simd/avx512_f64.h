/* avx512_f64.h: the vocabulary in AVX-512F/DQ/VL words, 8 doubles a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f64.h"

enum { LANES = 8, ROW_TILE = 24, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 8,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 2,
    DOT_ROWS = 4
}; /* blocks that fit the registers */
enum { OWN_ALONE = 8, NARROW_ALONE = 2 }; /* rows that take keys one by one: see dot_keys */

typedef __m512d vec;
typedef __mmask8 mask;

static inline vec vset(real x) { return _mm512_set1_pd(x); }
static inline vec viota(void) { return _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7); }
static inline vec vload(const real *p) { return _mm512_loadu_pd(p); }
static inline vec vload_n(const real *p, int n) { return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1u), p); }
static inline void vstore(real *p, vec x) { _mm512_storeu_pd(p, x); }

static inline vec vadd(vec a, vec b) { return _mm512_add_pd(a, b); }
static inline vec vsub(vec a, vec b) { return _mm512_sub_pd(a, b); }
static inline vec vmul(vec a, vec b) { return _mm512_mul_pd(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm512_div_pd(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm512_max_pd(a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
static inline mask veq(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
static inline vec vselect(mask m, vec a, vec b) { return _mm512_mask_blend_pd(m, b, a); }

static inline vec vzip_low(vec a, vec b) { /* a0 b0 a1 b1 ...: the lower half of both */
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
}
static inline vec vzip_high(vec a, vec b) {
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
}

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x), 52));
}

static inline __m256d vhalves(vec x) { return _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1)); }
static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    __m256d ab = _mm256_hadd_pd(vhalves(a), vhalves(b)), cd = _mm256_hadd_pd(vhalves(c), vhalves(d));
    __m256d low = _mm256_permute2f128_pd(ab, cd, 0x20), high = _mm256_permute2f128_pd(ab, cd, 0x31);
    _mm256_storeu_pd(p, _mm256_add_pd(low, high));
}

#include "narrow_by_one.h"
