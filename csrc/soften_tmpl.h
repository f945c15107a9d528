/* soften_tmpl.h: scores to weights, and what they do to a row's maximum and sum: softmax as it goes along.
 *
 * A score is finished (softcap, bias, selection) before its maximum is taken; where nothing is asked of it, it is read
 * only.  Included by kernels_tmpl.h; the table's soften_lanes and soften_rows. */
/* clang-format off */

/* What is done to a vector of scores before its weights: softcap, bias, selection. */
struct finish {
    vec cap, inverse; /* softcap and 1 / softcap */
    bool capped;
    vec lo, hi;
};

static struct finish finish_of(double softcap, vec lo, vec hi) {
    const real cap = (real)softcap;
    return (struct finish){vset(cap), vset(cap > 0 ? 1 / cap : 0), cap > 0, lo, hi};
}

/* The finished score of key j, or -inf where it is dropped. */
BLOCK vec finished(vec s, const real *bias, vec j, const struct finish *f) {
    const vec never = vset(-INFINITY);
    if (f->capped) s = vmul(f->cap, vtanh(vmul(s, f->inverse)));
    if (bias) {
        const vec b = vload(bias);
        s = vselect(veq(b, never), never, vadd(s, b));
    }
    return vselect(vlt(j, f->lo), never, vselect(vlt(j, f->hi), s, never));
}

/* The maximum to subtract: 0 for a row that has only -inf, so that its weights are exp(-inf) = 0. */
BLOCK vec shift_of(vec m) { return vselect(veq(m, vset(-INFINITY)), vset(0), m); }

/* What is done to `count` vectors of scores `stride` reals apart: a lane's keys one after another, or a row's. */

/* Keys stand at `at` in the first vector, and `step` further in each one after it. */
BLOCK vec finish(real *s, const real *bias, const ptrdiff_t stride, int count, vec at, const vec step,
                 const struct finish *f, vec m) {
    for (int i = 0; i < count; i++, at = vadd(at, step)) {
        const vec x = finished(vload(s + i * stride), bias ? bias + i * stride : NULL, at, f);
        vstore(s + i * stride, x);
        m = vmax(x, m); /* in this order NaN is left to the sum */
    }
    return m;
}

/* Several maxima side by side: one alone would wait for itself. */
BLOCK vec highest(const real *s, const ptrdiff_t stride, int count, vec m) {
    enum { SIDE = 4 };
    vec top[SIDE] = {m, m, m, m};
    int i = 0;
    for (; count - i >= SIDE; i += SIDE)
        UNROLL for (int n = 0; n < SIDE; n++) top[n] = vmax(vload(s + (i + n) * stride), top[n]);
    for (; i < count; i++) m = vmax(vload(s + i * stride), m);
    return vmax(m, vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

BLOCK vec weigh(real *s, const ptrdiff_t stride, int count, vec shift) {
    vec sum = vset(0);
    for (int i = 0; i < count; i++) {
        const vec p = vexp(vsub(vload(s + i * stride), shift));
        vstore(s + i * stride, p);
        sum = vadd(sum, p);
    }
    return sum;
}

static void soften_lanes(void *s_, const void *bias_, const void *lo_, const void *hi_, int lanes, int keys,
                         double softcap, void *m_, void *l_, void *alpha_) {
    const real *bias = bias_, *lo = lo_, *hi = hi_;
    for (int lane = 0; lane < lanes; lane += LANES) {
        real *s = (real *)s_ + lane, *m = (real *)m_ + lane, *l = (real *)l_ + lane;
        const vec old = vload(m);
        const struct finish f =
            finish_of(softcap, lo ? vload(lo + lane) : vset(0), lo ? vload(hi + lane) : vset(GQA_KEY_TILE));
        const vec top = lo || bias || f.capped
                            ? finish(s, bias ? bias + lane : NULL, ROW_TILE, keys, vset(0), vset(1), &f, old)
                            : highest(s, ROW_TILE, keys, old);
        const vec shift = shift_of(top), fade = vexp(vsub(old, shift)), sum = weigh(s, ROW_TILE, keys, shift);
        vstore(m, top);
        vstore(l, vfma(vload(l), fade, sum));
        vstore((real *)alpha_ + lane, fade);
    }
}

static real first_of(vec x) {
    real part[LANES];
    vstore(part, x);
    return part[0];
}

static real largest(vec x) {
    real part[LANES];
    vstore(part, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

static real total(vec x) {
    real sums[4];
    vstore_sums(sums, x, x, x, x);
    return sums[0];
}

static void soften_rows(void *s_, const void *bias_, const void *lo, const void *hi, int rows, int keys, double softcap,
                        void *m_, void *l_, void *alpha) {
    const int count = (keys + LANES - 1) / LANES;
    for (int r = 0; r < rows; r++) {
        real *s = (real *)s_ + r * GQA_KEY_TILE, *m = (real *)m_ + r, *l = (real *)l_ + r;
        const real *bias = bias_ ? (const real *)bias_ + r * GQA_KEY_TILE : NULL;
        const struct finish f =
            finish_of(softcap, vset(lo ? ((const real *)lo)[r] : 0), vset(hi ? ((const real *)hi)[r] : (real)keys));
        const vec old = vset(*m);
        const bool plain = !lo && !bias && !f.capped && keys % LANES == 0;
        const vec top = vset(largest(plain ? highest(s, LANES, count, old)
                                           : finish(s, bias, LANES, count, viota(), vset(LANES), &f, old)));
        const vec shift = shift_of(top), sum = weigh(s, LANES, count, shift);
        const real fade = first_of(vexp(vsub(old, shift)));
        *m = first_of(top);
        *l = *l * fade + total(sum);
        ((real *)alpha)[r] = fade;
    }
}
