/* scalar_f64.h: the vocabulary in plain C, one double a vector: any machine, and the model for the others.
 * Every vocabulary file defines the same words in the same order. */
#include "../real_f64.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 1, ROW_TILE = 12, FEW_ROWS = 8 };
enum {
    ROW_VECTORS = 3,
    COLUMNS = 4,
    FEW_VECTORS = 3,
    FEW_COLUMNS = 1,
    DOT_ROWS = 2
}; /* blocks that fit the registers */

typedef real vec;
typedef bool mask;

static inline vec vset(real x) { return x; }
static inline vec viota(void) { return 0; }
static inline vec vload(const real *p) { return *p; }
static inline vec vload_n(const real *p, int n) { return n > 0 ? *p : 0; }
static inline void vstore(real *p, vec x) { *p = x; }

static inline vec vadd(vec a, vec b) { return a + b; }
static inline vec vsub(vec a, vec b) { return a - b; }
static inline vec vmul(vec a, vec b) { return a * b; }
static inline vec vdiv(vec a, vec b) { return a / b; }
static inline vec vfma(vec a, vec b, vec c) { return a * b + c; } /* two roundings: fma() is a library call here */
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }    /* b where either is NaN */

static inline mask vlt(vec a, vec b) { return a < b; }
static inline mask veq(vec a, vec b) { return a == b; }
static inline vec vselect(mask m, vec a, vec b) { return m ? a : b; }

/* Adding and taking away 1.5 * 2^52 leaves no room for a fraction. */
static inline vec vround(vec x) { return (x + REAL(6755399441055744.0)) - REAL(6755399441055744.0); }
static inline vec vpow2(vec n) { /* n integral, -1023 (giving 0) to 1023; NaN may give anything */
    int64_t bits = (int64_t)((uint64_t)(int64_t)(n > -1023 ? n : -1023) + 1023) << 52;
    vec power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    p[0] = a, p[1] = b, p[2] = c, p[3] = d;
}

#include "narrow_by_one.h"
