/* real_f32.h: single precision for the templates: the type and the constants of exp and tanh. */
#ifndef GQA_REAL_H
#define GQA_REAL_H

#include <math.h>

typedef float real;

#define REAL(x) x##f
#define EXP_CUT REAL(-70.7011) /* 2^-102: times a number down to 2^-24 it is still a normal one */
#define EXP_ZERO REAL(-87.9)   /* rounds to 2^-127, whose bits are those of 0 */
/* added to a number of up to 2^21, it leaves the nearest integer n, and n + 127 in the lowest bits */
#define TO_EXPONENT REAL(12583039.0)
#define LN2_HIGH REAL(0.693359375)
#define LN2_LOW REAL(-2.12194440e-4)
/* (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, Chebyshev fit, relative error 8e-9; highest power first */
static const real exp_terms[] = {1.3926213e-3f, 8.363203e-3f, 4.1666556e-2f, 1.6666576e-1f, 0.5f};
/* (tanh(x) / x - 1) / x^2 in powers of x^2 on |x| <= 0.4, relative error 6e-9; highest power first */
static const real tanh_terms[] = {1.92680460e-2f, -5.37151214e-2f, 1.33325321e-1f, -3.33333293e-1f};

#endif
