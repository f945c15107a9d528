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

static vec finish_lanes(real *s, const real *bias, const struct finish *f, int keys, vec m) {
    for (int j = 0; j < keys; j++) {
        const vec x = finished(vload(s + j * ROW_TILE), bias ? bias + j * ROW_TILE : NULL, vset((real)j), f);
        vstore(s + j * ROW_TILE, x);
        m = vmax(x, m); /* in this order NaN is left to the sum */
    }
    return m;
}

/* Several maxima side by side: one alone would wait for itself. */
static vec highest_lanes(const real *s, int keys, vec m) {
    enum { SIDE = 4 };
    vec top[SIDE] = {m, m, m, m};
    int j = 0;
    for (; keys - j >= SIDE; j += SIDE)
        UNROLL for (int i = 0; i < SIDE; i++) top[i] = vmax(vload(s + (j + i) * ROW_TILE), top[i]);
    for (; j < keys; j++) m = vmax(vload(s + j * ROW_TILE), m);
    return vmax(m, vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

static vec weigh_lanes(real *s, int keys, vec shift) {
    vec sum = vset(0);
    for (int j = 0; j < keys; j++) {
        const vec p = vexp(vsub(vload(s + j * ROW_TILE), shift));
        vstore(s + j * ROW_TILE, p);
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
        const vec top = lo || bias || f.capped ? finish_lanes(s, bias ? bias + lane : NULL, &f, keys, old)
                                               : highest_lanes(s, keys, old);
        const vec shift = shift_of(top), fade = vexp(vsub(old, shift)), sum = weigh_lanes(s, keys, shift);
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

static vec finish_row(real *s, const real *bias, const struct finish *f, int keys, vec m) {
    for (int j = 0; j < keys; j += LANES) {
        const vec x = finished(vload(s + j), bias ? bias + j : NULL, vadd(vset((real)j), viota()), f);
        vstore(s + j, x);
        m = vmax(x, m);
    }
    return m;
}

static vec highest_row(const real *s, int keys, vec m) {
    for (int j = 0; j < keys; j += LANES) m = vmax(vload(s + j), m);
    return m;
}

static vec weigh_row(real *s, int keys, vec shift) {
    vec sum = vset(0);
    for (int j = 0; j < keys; j += LANES) {
        const vec p = vexp(vsub(vload(s + j), shift));
        vstore(s + j, p);
        sum = vadd(sum, p);
    }
    return sum;
}

static void soften_rows(void *s_, const void *bias_, const void *lo, const void *hi, int rows, int keys, double softcap,
                        void *m_, void *l_, void *alpha) {
    for (int r = 0; r < rows; r++) {
        real *s = (real *)s_ + r * GQA_KEY_TILE, *m = (real *)m_ + r, *l = (real *)l_ + r;
        const real *bias = bias_ ? (const real *)bias_ + r * GQA_KEY_TILE : NULL;
        const struct finish f =
            finish_of(softcap, vset(lo ? ((const real *)lo)[r] : 0), vset(hi ? ((const real *)hi)[r] : (real)keys));
        const vec old = vset(*m);
        const bool plain = !lo && !bias && !f.capped && keys % LANES == 0;
        const vec top = vset(largest(plain ? highest_row(s, keys, old) : finish_row(s, bias, &f, keys, old)));
        const vec shift = shift_of(top), sum = weigh_row(s, keys, shift);
        const real fade = first_of(vexp(vsub(old, shift)));
        *m = first_of(top);
        *l = *l * fade + total(sum);
        ((real *)alpha)[r] = fade;
    }
}
