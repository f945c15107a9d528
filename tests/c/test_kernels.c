/* test_kernels.c: the products and what puts parts together, of every table this CPU can run,
 * against a plain loop in double; test_soften.c and test_load.c have the other kernels.
 *
 * Linked with csrc/ without csrc/python; also cross-compiled and run under qemu, which is how
 * NEON is tested. */
#include "kernel_check.h"

/* ---- outer, outer_few, and the careful ones ---- */

enum form { MANY, FEW, CAREFUL, CAREFUL_FEW };

static const char *const form_names[] = {"outer", "outer_few", "outer_careful", "outer_few_careful"};

struct product {
    enum form form;
    int n, lanes, count;
    ptrdiff_t c_stride, a_stride, b_n, b_t;
    void *c, *scale, *a, *b;
};

/* Element (i, lane) of the result, and the sum of the absolute values of its terms. */
static double outer_element(const struct product *p, int i, int lane, double *size) {
    double sum = p->scale ? get(p->c, i * p->c_stride + lane) * get(p->scale, lane) : 0;
    *size = fabs(sum);
    for (int t = 0; t < p->count; t++) {
        const double x = get(p->a, t * p->a_stride + lane), y = get(p->b, i * p->b_n + t * p->b_t);
        if (p->form >= CAREFUL && (x == 0 || y == 0)) continue;
        sum += x * y;
        *size += fabs(x * y);
    }
    return sum;
}

static void multiply(const struct product *p, void *c) {
    gqa_outer *many = p->form == MANY ? kernels->outer : kernels->outer_careful;
    gqa_outer_few *few = p->form == FEW ? kernels->outer_few : kernels->outer_few_careful;
    const int rows = p->n % 2 ? 1000 : 0; /* which need not be there */
    struct gqa_fetch next = gqa_rows_to_come(64, 4096, rows, 100, GQA_FETCH_LINES);
    if (p->form == MANY || p->form == CAREFUL)
        many(c, p->scale, p->a, p->lanes, p->b, p->b_n, p->b_t, p->n, p->count, p->n % 3 ? &next : NULL);
    else
        few(c, p->c_stride, p->a, p->a_stride, gqa_own_dtype(kernels), p->lanes, p->b, p->b_n, p->n, p->count,
            GQA_FETCH_AHEAD);
}

static void check_outer(const struct product *p) {
    void *c = copy_of(p->c, p->n * p->c_stride);
    multiply(p, c);
    for (int i = 0; i < p->n; i++) {
        double size;
        for (int lane = 0; lane < p->lanes; lane++) {
            const double wanted = outer_element(p, i, lane, &size);
            const double allowed = (p->count + 4) * (epsilon() * size + tiny() * epsilon());
            expect("c", i, lane, get(c, i * p->c_stride + lane), wanted, allowed);
        }
        for (ptrdiff_t gap = padded(p->lanes); gap < p->c_stride; gap++)
            expect("gap", i, gap, get(c, i * p->c_stride + gap), get(p->c, i * p->c_stride + gap), 0);
    }
    judge(form_names[p->form], p->n, p->lanes, p->count, p->b_t == 1);
    free(c);
}

/* NaN and infinities that a factor 0 drops, and some that nothing drops. */
static void poison(const struct product *p) {
    for (int t = 0; t < p->count; t += 3) {
        put(p->b, (p->n - 1) * p->b_n + t * p->b_t, t % 2 ? NAN : INFINITY);
        for (int lane = 0; lane < p->lanes; lane += 2) put(p->a, t * p->a_stride + lane, 0);
        put(p->a, t * p->a_stride, t % 2 ? 0 : NAN);
        put(p->b, t * p->b_t, 0);
    }
}

static void test_outer_of(enum form form, int n, int lanes, int count, enum kind kind, bool b_rows, bool scaled) {
    const bool few = form == FEW || form == CAREFUL_FEW;
    struct product p = {.form = form, .n = n, .lanes = few ? lanes : tile_lanes(padded(lanes)), .count = count};
    lanes = p.lanes;
    p.c_stride = few ? padded(lanes) + 3 : kernels->row_tile;
    p.a_stride = few ? lanes + 1 : kernels->row_tile;
    p.b_n = b_rows ? count + 2 : 1;
    p.b_t = b_rows ? 1 : n + 2;
    p.a = drawn(count ? (count - 1) * p.a_stride + lanes : 0, kind);
    p.b = drawn(count ? (n - 1) * p.b_n + (count - 1) * p.b_t + 1 : 0, kind == DENORMAL ? RANDOM : kind);
    p.c = scaled ? drawn(n * p.c_stride, RANDOM) : reals(n * p.c_stride, 7e7); /* 7e7: to be overwritten */
    p.scale = form % 2 ? reals(padded(lanes), 1) : scaled ? drawn(padded(lanes), WITH_ZEROS) : NULL;
    check_outer(&p);
    if (form >= CAREFUL) poison(&p), check_outer(&p);
    free(p.a), free(p.b), free(p.c), free(p.scale);
}

static void test_outer(void) {
    static const int counts[] = {0, 1, 3, 17, 128};
    for (int i = 0; i < COUNT(few_sizes); i++)
        for (int j = 0; j < COUNT(lane_sizes); j++)
            for (int k = 0; k < COUNT(counts); k++) {
                const enum kind kind = (enum kind)((i + j + k) % KINDS);
                const int n = few_sizes[i], lanes = lane_sizes[j], count = counts[k];
                test_outer_of(MANY, n, lanes, count, kind, (j + k) % 2, (i + k) % 2);
                test_outer_of(FEW, n, lanes, count, kind, true, true);
                test_outer_of(CAREFUL_FEW, n, lanes, count, kind, true, true);
                test_outer_of(CAREFUL, n, lanes, count, kind, (j + k) % 2, (i + k) % 2);
            }
    for (int i = 0; i < COUNT(few_sizes); i++) test_outer_of(FEW, few_sizes[i], 0, 17, RANDOM, true, true);
}

/* ---- dot ---- */

static void test_dot_of(int rows, int keys, int head_dim, enum kind kind) {
    const ptrdiff_t q_stride = padded(head_dim), k_stride = head_dim + 1;
    void *q = reals(rows * q_stride, 0), *k = drawn((keys - 1) * k_stride + head_dim, kind);
    void *s = reals(rows * GQA_KEY_TILE, 7e7);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < head_dim; t++) put(q, r * q_stride + t, value_of(kind == DENORMAL ? RANDOM : kind));
    kernels->dot(s, q, q_stride, rows, k, k_stride, gqa_own_dtype(kernels), keys, head_dim, GQA_FETCH_AHEAD);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < GQA_KEY_TILE; j++) {
            if (j >= keys && j < (keys + 3) / 4 * 4) continue; /* anything may stand there */
            double sum = j < keys ? 0 : 7e7, size = 0;
            for (int t = 0; t < head_dim && j < keys; t++) {
                const double term = get(q, r * q_stride + t) * get(k, j * k_stride + t);
                sum += term;
                size += fabs(term);
            }
            expect("s", r, j, get(s, r * GQA_KEY_TILE + j), sum,
                   (head_dim + 4) * (epsilon() * size + tiny() * epsilon()));
        }
    judge("dot", rows, keys, head_dim, (int)kind);
    free(q), free(k), free(s);
}

static void test_dot(void) {
    for (int rows = 0; rows < COUNT(few_sizes); rows++)
        for (int keys = 0; keys < COUNT(key_sizes); keys++)
            for (int head_dim = rows % 2; head_dim < COUNT(lane_sizes); head_dim += 2)
                test_dot_of(few_sizes[rows], key_sizes[keys], lane_sizes[head_dim],
                            (enum kind)((rows + keys + head_dim) % KINDS));
}

/* ---- join, blend, divide ---- */

static void test_join(void) {
    for (int i = 0; i < COUNT(lane_sizes); i++) {
        const int lanes = lane_sizes[i], room = padded(lanes);
        void *m = reals(room, -INFINITY), *l = reals(room, 0), *n = reals(room, -INFINITY), *k = reals(room, 0);
        void *w = reals(room, 7), *v = reals(room, 7);
        for (int r = 0; r < lanes; r++) {
            if (r % 4 & 1) put(m, r, 50 * chance()), put(l, r, 1 + chance());
            if (r % 4 & 2) put(n, r, 50 * chance()), put(k, r, 1 + chance());
        }
        void *old_m = copy_of(m, room), *old_l = copy_of(l, room);
        kernels->join(m, l, n, k, w, v, lanes);
        for (int r = 0; r < lanes; r++) {
            const double a = get(old_m, r), b = get(n, r), top = a > b ? a : b, shift = top == -INFINITY ? 0 : top;
            const double x = exp(a - shift), y = exp(b - shift), sum = get(old_l, r) * x + get(k, r) * y;
            const double slack = 60 * epsilon();
            expect("m", r, 0, get(m, r), top, 0);
            expect("weight", r, 0, get(w, r), x, x == 1 ? 0 : slack * x); /* exactly 1: the same bits */
            expect("other weight", r, 0, get(v, r), y, y == 1 ? 0 : slack * y);
            expect("l", r, 0, get(l, r), sum, x * y == 0 ? 0 : slack * sum);
        }
        judge("join", lanes, 0, 0, 0);
        free(m), free(l), free(n), free(k), free(w), free(v), free(old_m), free(old_l);
    }
}

static void test_blend_of(int n, int lanes, bool rows, bool other, enum kind kind) {
    const ptrdiff_t stride = padded(lanes);
    void *c = drawn(n * stride, kind), *d = other ? drawn(n * stride, kind) : NULL, *old = copy_of(c, n * stride);
    void *w = drawn(padded(rows ? n : lanes), WITH_ZEROS), *v = drawn(padded(rows ? n : lanes), WITH_ZEROS);
    kernels->blend(c, d, stride, n, lanes, w, other ? v : NULL, rows);
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane++) {
            const ptrdiff_t at = i * stride + lane;
            const double x = get(old, at) * get(w, rows ? i : lane);
            const double y = other ? get(d, at) * get(v, rows ? i : lane) : 0;
            expect("c", i, lane, get(c, at), x + y, epsilon() * (2 * fabs(x) + fabs(y) + tiny()));
        }
    judge("blend", n, lanes, rows, other);
    free(c), free(d), free(old), free(w), free(v);
}

static void test_divide_of(int n, int lanes, bool rows, enum kind kind) {
    const ptrdiff_t stride = padded(lanes);
    void *c = drawn(n * stride, kind), *old = NULL, *l = drawn(padded(rows ? n : lanes), WITH_ZEROS);
    for (int i = 0; i < n * stride; i += 5)
        if (get(l, rows ? i / stride : i % stride) == 0) put(c, i, NAN);
    old = copy_of(c, n * stride);
    kernels->divide(c, stride, n, lanes, l, rows);
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane++) {
            const ptrdiff_t at = i * stride + lane;
            const double by = get(l, rows ? i : lane), wanted = by == 0 ? 0 : get(old, at) / by;
            expect("c", i, lane, get(c, at), wanted, epsilon() * (fabs(wanted) + tiny()));
        }
    judge("divide", n, lanes, rows, (int)kind);
    free(c), free(old), free(l);
}

static void test_blend_and_divide(void) {
    for (int n = 0; n < COUNT(few_sizes); n++)
        for (int lanes = 0; lanes < COUNT(lane_sizes); lanes++)
            for (int rows = 0; rows < 2; rows++) {
                const enum kind kind = (enum kind)((n + lanes + rows) % KINDS);
                test_blend_of(few_sizes[n], lane_sizes[lanes], rows, false, kind);
                test_blend_of(few_sizes[n], lane_sizes[lanes], rows, true, kind);
                test_divide_of(few_sizes[n], lane_sizes[lanes], rows, kind);
            }
}

/* ---- finite, multiply, turn ---- */

static void test_finite_of(int n, int width, enum kind kind) {
    const ptrdiff_t stride = width + 2;
    void *x = drawn((n - 1) * stride + width, kind);
    for (int i = 0; i < n - 1; i++)
        for (ptrdiff_t gap = width; gap < stride; gap++) put(x, i * stride + gap, NAN); /* nobody's business */
    if (!kernels->all_finite(x, stride, gqa_own_dtype(kernels), n, width))
        snprintf(bad, sizeof bad, "finite values were not");
    const ptrdiff_t at = (ptrdiff_t)(chance() * n) * stride + (ptrdiff_t)(chance() * width);
    const double poisons[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        put(x, at, poisons[i]);
        if (kernels->all_finite(x, stride, gqa_own_dtype(kernels), n, width))
            snprintf(bad, sizeof bad, "%g at %td was missed", poisons[i], at);
    }
    judge("finite", n, width, (int)kind, 0);
    free(x);
}

static void test_multiply_of(int n, double factor) {
    void *from = drawn(n, RANDOM), *to = reals(n + 1, 7);
    kernels->multiply(to, from, n, factor);
    for (int i = 0; i <= n; i++) {
        const double wanted = i < n ? get(from, i) * factor : 7;
        expect("to", i, 0, get(to, i), wanted, i < n ? 2 * epsilon() * fabs(wanted) : 0);
    }
    judge("multiply", n, 0, 0, 0);
    free(from), free(to);
}

/* Bits are moved, not numbers: a NaN keeps its payload. */
static void test_turn_of(int n, int width) {
    const ptrdiff_t from_stride = width + 3, to_stride = n + 1;
    const size_t size = kernels->real_size;
    char *from = drawn(n * from_stride, WITH_ZEROS), *to = reals(width * to_stride, 7e7);
    memset(from + 1, 0xff, 3 * size); /* NaNs, and what lies across */
    kernels->turn(to, to_stride, from, from_stride, n, width);
    for (int t = 0; t < width; t++) {
        for (int i = 0; i < n; i++)
            expect("to", t, i,
                   memcmp(to + (size_t)(t * to_stride + i) * size, from + (size_t)(i * from_stride + t) * size, size),
                   0, 0);
        expect("gap", t, n, get(to, t * to_stride + n), 7e7, 0);
    }
    judge("turn", n, width, 0, 0);
    free(from), free(to);
}

static void test_finite_multiply_and_turn(void) {
    for (int width = 0; width < COUNT(lane_sizes); width++) {
        for (int n = 0; n < COUNT(few_sizes); n++)
            test_finite_of(few_sizes[n], lane_sizes[width], (enum kind)((n + width) % KINDS));
        test_multiply_of(lane_sizes[width], width % 2 ? 0.125 : -0.3);
        for (int n = kernels->lanes; n <= 3 * kernels->lanes; n += kernels->lanes)
            test_turn_of(n, padded(lane_sizes[width]));
    }
}

static void test_table(void) {
    test_outer();
    test_dot();
    test_join();
    test_blend_and_divide();
    test_finite_multiply_and_turn();
}

int main(void) { return on_every_table(test_table); }
