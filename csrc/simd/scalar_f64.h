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
enum { OWN_ALONE = 2, NARROW_ALONE = 0 }; /* rows that take keys one by one: see dot_keys */

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

static inline vec vzip_low(vec a, vec b) { return (void)b, a; } /* a0 b0 a1 b1 ...: the lower half of both */
static inline vec vzip_high(vec a, vec b) { return (void)a, b; }

static inline vec vexponent(vec x) { /* x's lowest bits in the place of an exponent, the others gone */
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits <<= 52;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline void vstore_sums(real *p, vec a, vec b, vec c, vec d) { /* p[0..3] = sums of a, b, c, d */
    p[0] = a, p[1] = b, p[2] = c, p[3] = d;
}

#include "narrow_by_one.h"
