/* real_f64.h: double precision for the templates: the type and the constants of exp and tanh. */
#ifndef GQA_REAL_H
#define GQA_REAL_H

#include <math.h>

typedef double real;

#define REAL(x) x
#define EXP_CUT REAL(-671.66) /* 2^-969: times a number down to 2^-53 it is still a normal one */
#define EXP_ZERO REAL(-708.9) /* rounds to 2^-1023, whose bits are those of 0 */
/* added to a number of up to 2^50, it leaves the nearest integer n, and n + 1023 in the lowest bits */
#define TO_EXPONENT REAL(6755399441056767.0)
#define LN2_HIGH REAL(0.693145751953125)
#define LN2_LOW REAL(1.42860682030941723212e-6)
/* (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, Chebyshev fit, relative error 2e-17; highest power first */
static const real exp_terms[] = {
    2.5100424157005067e-08, 2.7620138719733994e-07,
    2.7557268378684192e-06, 2.480152119021773e-05,
    1.9841269863105968e-04, 1.3888888917281794e-03,
    8.333333333330051e-03,  4.166666666662399e-02,
    1.6666666666666669e-01, 0.5,
};
/* (tanh(x) / x - 1) / x^2 in powers of x^2 on |x| <= 0.4, relative error 2e-21; highest power first */
static const real tanh_terms[] = {
    -2.772668243621711e-05, 9.281232729653377e-05, -2.382770411578986e-04, 5.899160324889024e-04,
    -1.455824964051031e-03, 3.592127522663161e-03, -8.863235512384432e-03, 2.186948853583623e-02,
    -5.396825396825040e-02, 1.333333333333333e-01, -3.333333333333333e-01,
};

#endif
