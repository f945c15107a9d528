/* avx2_f64.h: the vocabulary in AVX2 and FMA words, 4 doubles a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f64.h"

enum { LANES = 4, ROW_TILE = 12, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 4,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 1,
    DOT_ROWS = 2
}; /* blocks that fit the registers */
enum { OWN_ALONE = 2, NARROW_ALONE = 0 }; /* rows that take keys one by one: see dot_keys */

typedef __m256d vec;
typedef __m256d mask;

static inline vec vset(real x) { return _mm256_set1_pd(x); }
static inline vec viota(void) { return _mm256_setr_pd(0, 1, 2, 3); }
static inline vec vload(const real *p) { return _mm256_loadu_pd(p); }
static inline vec vload_n(const real *p, int n) {
    __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
}
static inline void vstore(real *p, vec x) { _mm256_storeu_pd(p, x); }

static inline vec vadd(vec a, vec b) { return _mm256_add_pd(a, b); }
static inline vec vsub(vec a, vec b) { return _mm256_sub_pd(a, b); }
static inline vec vmul(vec a, vec b) { return _mm256_mul_pd(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm256_div_pd(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm256_max_pd(a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_LT_OQ); }
static inline mask veq(vec a, vec b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
static inline vec vselect(mask m, vec a, vec b) { return _mm256_blendv_pd(b, a, m); }

static inline vec vzip_low(vec a, vec b) { /* a0 b0 a1 b1 ...: the lower half of both */
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
}
static inline vec vzip_high(vec a, vec b) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
}

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x), 52));
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    __m256d ab = _mm256_hadd_pd(a, b), cd = _mm256_hadd_pd(c, d);
    __m256d low = _mm256_permute2f128_pd(ab, cd, 0x20), high = _mm256_permute2f128_pd(ab, cd, 0x31);
    _mm256_storeu_pd(p, _mm256_add_pd(low, high));
}

#include "narrow_by_one.h"
