/* math_tmpl.h: exp and tanh, once, in words of the vocabulary.  Included by kernels_tmpl.h. */

/* exp(x) for x <= 0 within 2.5 ulp, exactly 1 at 0, NaN for NaN, and exactly 0 below EXP_CUT, -inf included: sums that
 * begin with smaller weights are subnormal, and Intel's CPUs take a hundred cycles for each such sum. */
static inline vec vexp(vec x) {
    const real log2_e = REAL(1.44269504088896340736);
    x = vselect(vlt(x, vset(EXP_CUT)), vset(EXP_ZERO), x);
    const vec shifted = vfma(x, vset(log2_e), vset(TO_EXPONENT)), n = vsub(shifted, vset(TO_EXPONENT));
    const vec r = vfma(n, vset(-LN2_LOW), vfma(n, vset(-LN2_HIGH), x));
    vec sum = vset(exp_terms[0]);
    for (size_t i = 1; i < sizeof exp_terms / sizeof *exp_terms; i++) sum = vfma(sum, r, vset(exp_terms[i]));
    sum = vfma(vfma(sum, r, vset(1)), r, vset(1));
    return vmul(sum, vexponent(shifted));
}

/* tanh(x) within 3 ulp, NaN for NaN. */
static inline vec vtanh(vec x) {
    const vec size = vmax(x, vsub(vset(0), x)), square = vmul(x, x);
    vec sum = vset(tanh_terms[0]);
    for (size_t i = 1; i < sizeof tanh_terms / sizeof *tanh_terms; i++) sum = vfma(sum, square, vset(tanh_terms[i]));
    const vec small = vfma(vmul(sum, square), x, x);
    const vec fade = vexp(vmul(size, vset(-2))); /* 1 - fade loses nothing once |x| > 0.4 */
    const vec large = vdiv(vsub(vset(1), fade), vadd(vset(1), fade));
    const vec signed_large = vselect(vlt(x, vset(0)), vsub(vset(0), large), large);
    return vselect(vlt(size, vset(REAL(0.4))), small, signed_large);
}
