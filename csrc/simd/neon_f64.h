/* neon_f64.h: the vocabulary in AArch64 NEON words, 2 doubles a vector.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f64.h"

enum { LANES = 2, ROW_TILE = 12, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 8,
    FEW_VECTORS = 8,
    FEW_COLUMNS = 2,
    DOT_ROWS = 4
}; /* blocks that fit the registers */
enum { OWN_ALONE = 2, NARROW_ALONE = 0 }; /* rows that take keys one by one: see dot_keys */

typedef float64x2_t vec;
typedef uint64x2_t mask;

static inline vec vset(real x) { return vdupq_n_f64(x); }
static inline vec viota(void) { return (vec){0, 1}; }
static inline vec vload(const real *p) { return vld1q_f64(p); }
static inline vec vload_n(const real *p, int n) { return (vec){p[0], n > 1 ? p[1] : 0}; }
static inline void vstore(real *p, vec x) { vst1q_f64(p, x); }

static inline vec vadd(vec a, vec b) { return vaddq_f64(a, b); }
static inline vec vsub(vec a, vec b) { return vsubq_f64(a, b); }
static inline vec vmul(vec a, vec b) { return vmulq_f64(a, b); }
static inline vec vdiv(vec a, vec b) { return vdivq_f64(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return vfmaq_f64(c, a, b); }
static inline vec vmax(vec a, vec b) { return vbslq_f64(vcgtq_f64(a, b), a, b); } /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return vcltq_f64(a, b); }
static inline mask veq(vec a, vec b) { return vceqq_f64(a, b); }
static inline vec vselect(mask m, vec a, vec b) { return vbslq_f64(m, a, b); }

static inline vec vzip_low(vec a, vec b) { return vzip1q_f64(a, b); } /* a0 b0 a1 b1 ...: the lower half of both */
static inline vec vzip_high(vec a, vec b) { return vzip2q_f64(a, b); }

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(x), 52));
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    vst1q_f64(p, vpaddq_f64(a, b));
    vst1q_f64(p + 2, vpaddq_f64(c, d));
}

#include "narrow_by_one.h"
