/* test_soften.c: scores to weights, of every table this CPU can run, against a plain loop in double:
 * bounds, biases, dropped slots that hold NaN, live infinities, and exp alone over its whole range. */
#include "kernel_check.h"

struct softening {
    bool in_lanes;
    int rows, keys; /* rows: lanes, or rows of s */
    ptrdiff_t row_step, key_step;
    void *s, *bias, *lo, *hi, *m, *l;
    double softcap; /* 0 = off */
};

/* Smaller weights count as 0: EXP_CUT, and a factor of 2 for the argument's rounding. */
static double least(void) { return kernels->real_size == sizeof(float) ? 0x1p-101 : 0x1p-968; }

/* How far a score may be off after softcap: tanh within 3 ulp, and its argument's rounding. */
static double slack(const struct softening *p) { return 8 * epsilon() * p->softcap; }

static double *finished_scores(const struct softening *p, int r, double *top) {
    double *score = malloc((size_t)p->keys * sizeof *score);
    if (!score) exit(3);
    for (int j = 0; j < p->keys; j++) {
        const ptrdiff_t at = r * p->row_step + j * p->key_step;
        const double bias = p->bias ? get(p->bias, at) : 0;
        const bool live = (!p->lo || (j >= get(p->lo, r) && j < get(p->hi, r))) && bias > -INFINITY;
        const double raw = get(p->s, at), capped = p->softcap > 0 ? p->softcap * tanh(raw / p->softcap) : raw;
        const double sum =
            kernels->real_size == sizeof(float) ? (double)((float)capped + (float)bias) : capped + bias;
        score[j] = live ? sum : -INFINITY;
        if (score[j] > *top) *top = score[j];
    }
    return score;
}

static void check_softened(const struct softening *p, int r, const void *s, const void *m, const void *l,
                           const void *alpha) {
    const double old = get(p->m, r);
    double top = old, sum = 0;
    double *score = finished_scores(p, r, &top);
    const double shift = top == -INFINITY ? 0 : top, fade = exp(old - shift);
    for (int j = 0; j < p->keys; j++) {
        const double weight = exp(score[j] - shift), got = get(s, r * p->row_step + j * p->key_step);
        /* the argument's own rounding counts once for each unit of it */
        expect("weight", r, j, got, weight, weight * (epsilon() * (4 + fabs(score[j] - shift)) + 2 * slack(p)) + least());
        if (score[j] == -INFINITY && got != 0) expect("dropped weight", r, j, got, 0, 0);
        sum += weight;
    }
    const double before = get(p->l, r);
    expect("m", r, 0, get(m, r), top, slack(p));
    expect("alpha", r, 0, get(alpha, r), fade, fade * (epsilon() * (4 + fabs(old - shift)) + slack(p)) + least());
    expect("l", r, 0, get(l, r), before * fade + sum, ((p->keys + 100) * epsilon() + 2 * slack(p)) * (before * fade + sum));
    free(score);
}

static void check_soften(const struct softening *p) {
    const int stats = padded(p->rows);
    const ptrdiff_t size = p->in_lanes ? (ptrdiff_t)p->keys * kernels->row_tile : (ptrdiff_t)p->rows * GQA_KEY_TILE;
    void *s = copy_of(p->s, size), *m = copy_of(p->m, stats), *l = copy_of(p->l, stats), *alpha = reals(stats, 7e7);
    (p->in_lanes ? kernels->soften_lanes : kernels->soften_rows)(s, p->bias, p->lo, p->hi, p->rows, p->keys,
                                                                 p->softcap, m, l, alpha);
    for (int r = 0; r < p->rows; r++) check_softened(p, r, s, m, l, alpha);
    judge(p->in_lanes ? "soften_lanes" : "soften_rows", p->rows, p->keys, p->bias != NULL, p->lo != NULL);
    free(s), free(m), free(l), free(alpha);
}

/* Bounds of all sorts, none left among them; NaN and infinities in slots that they or a bias drop. */
static void mask_some(struct softening *p, double spread) {
    for (int r = 0; r < p->rows; r++) {
        const int lo = (int)(chance() * p->keys), hi = r % 5 ? lo + (int)(chance() * (p->keys - lo + 1)) : lo;
        if (p->lo) put(p->lo, r, r % 3 ? 0 : lo);
        if (p->lo) put(p->hi, r, r % 4 ? p->keys : hi);
        for (int j = 0; j < p->keys; j++) {
            const ptrdiff_t at = r * p->row_step + j * p->key_step;
            if (p->bias) put(p->bias, at, chance() < 0.3 || r == 1 ? -INFINITY : spread * (chance() - 0.5));
            const bool dropped = (p->bias && get(p->bias, at) == -INFINITY) ||
                                 (p->lo && (j < get(p->lo, r) || j >= get(p->hi, r)));
            if (dropped && chance() < 0.5) put(p->s, at, chance() < 0.5 ? NAN : INFINITY);
            if (!dropped && chance() < 0.1) put(p->s, at, -INFINITY); /* an overflow: weighs nothing */
        }
    }
}

static void test_soften_of(bool in_lanes, int rows, int keys, bool biased, bool bounded, double spread,
                           double softcap) {
    const ptrdiff_t size = in_lanes ? (ptrdiff_t)keys * kernels->row_tile : (ptrdiff_t)rows * GQA_KEY_TILE;
    const int stats = padded(rows);
    struct softening p = {.in_lanes = in_lanes, .rows = rows, .keys = keys,
                          .row_step = in_lanes ? 1 : GQA_KEY_TILE, .key_step = in_lanes ? kernels->row_tile : 1,
                          .s = reals(size, NAN), .bias = biased ? reals(size, 0) : NULL,
                          .lo = bounded ? reals(stats, 0) : NULL, .hi = bounded ? reals(stats, 0) : NULL,
                          .m = reals(stats, -INFINITY), .l = reals(stats, 0), .softcap = softcap};
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < keys; j++) put(p.s, r * p.row_step + j * p.key_step, spread * (chance() - 0.5));
        if (r % 3 == 0) continue; /* a first tile */
        put(p.m, r, spread * (chance() - 0.5));
        put(p.l, r, 1 + chance());
    }
    if (biased || bounded) mask_some(&p, spread);
    check_soften(&p);
    free(p.s), free(p.bias), free(p.lo), free(p.hi), free(p.m), free(p.l);
}

static void test_soften(void) {
    const double spreads[] = {1e-3, 8, 300, 1e6};
    for (int keys = 0; keys < COUNT(key_sizes); keys++)
        for (int variant = 0; variant < 32; variant++) {
            for (int rows = 0; rows < COUNT(lane_sizes) && lane_sizes[rows] <= kernels->row_tile; rows++)
                test_soften_of(true, lane_sizes[rows], key_sizes[keys], variant & 1, variant & 2,
                               spreads[variant / 4 % 4], variant < 16 ? 0 : 30);
            for (int rows = 0; rows < COUNT(few_sizes); rows++)
                test_soften_of(false, few_sizes[rows], key_sizes[keys], variant & 1, variant & 2,
                               spreads[variant / 4 % 4], variant < 16 ? 0 : 30);
        }
}

/* A live NaN or +inf makes the sum NaN and leaves the other rows alone. */
static void test_soften_broken(void) {
    const double broken[] = {NAN, INFINITY};
    for (int i = 0; i < 2; i++)
        for (int keys = 0; keys < COUNT(key_sizes); keys++) {
            const int rows = kernels->row_tile, last = key_sizes[keys] - 1;
            void *s = reals((ptrdiff_t)key_sizes[keys] * kernels->row_tile, 0), *m = reals(padded(rows), -INFINITY);
            void *l = reals(padded(rows), 0), *alpha = reals(padded(rows), 0);
            put(s, (ptrdiff_t)last * kernels->row_tile, broken[i]);
            kernels->soften_lanes(s, NULL, NULL, NULL, rows, last + 1, 0, m, l, alpha);
            expect("l", 0, 0, get(l, 0), NAN, 0);
            for (int r = 1; r < rows; r++) expect("l", r, 0, get(l, r), last + 1, 0);
            judge("soften_lanes broken", rows, last + 1, i, 0);
            free(s), free(m), free(l), free(alpha);
        }
}

/* exp alone: one score is 0 and the maximum, so that the others' exponentials stand as they are.
 * math_tmpl.h promises 2.5 units in the last place; the largest seen is printed. */
static void test_exp(void) {
    const double lowest = log(tiny()) * 1.1, step = lowest / 20000;
    double worst = 0;
    void *s = reals((ptrdiff_t)2 * kernels->row_tile, 0), *m = reals(kernels->row_tile, 0);
    void *l = reals(kernels->row_tile, 0), *alpha = reals(kernels->row_tile, 0);
    for (double x = 0; x > lowest; x += step * kernels->row_tile) {
        for (int lane = 0; lane < kernels->row_tile; lane++) put(s, kernels->row_tile + lane, x + lane * step);
        void *before = copy_of(s, 2 * kernels->row_tile);
        for (int lane = 0; lane < kernels->row_tile; lane++) put(s, lane, 0), put(m, lane, -INFINITY);
        kernels->soften_lanes(s, NULL, NULL, NULL, kernels->row_tile, 2, 0, m, l, alpha);
        for (int lane = 0; lane < kernels->row_tile; lane++) {
            const double wanted = exp(get(before, kernels->row_tile + lane)), got = get(s, kernels->row_tile + lane);
            const double error = wanted > least() ? fabs(got / wanted - 1) / (epsilon() / 2) : 0;
            if (error > worst) worst = error;
            expect("error", lane, 0, error, 0, 5);
            if (wanted < least() / 4) expect("exp", lane, 0, got, 0, 0);
        }
        judge("exp", (int)x, 0, 0, 0);
        free(before);
    }
    printf("%s: exp within %.2f roundings\n", table_name, worst);
    free(s), free(m), free(l), free(alpha);
}

static void test_table(void) {
    test_soften();
    test_soften_broken();
    test_exp();
}

int main(void) { return on_every_table(test_table); }
