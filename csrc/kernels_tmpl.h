/* kernels_tmpl.h: THE algorithm, once.  An isa file includes a vocabulary from simd/,
 * defines KERNELS (the name of the table) and includes this; what each kernel
 * promises stands in kernels.h.
 *
 * A lane's result never depends on its neighbours or on how many there are, and
 * sums over keys run in key order, tile by tile: that is what makes results the
 * same bits however rows and tiles are grouped. */
/* UNROLL stands before its loop, which clang-format does not understand. */
/* clang-format off */
#include "kernels.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "math_tmpl.h"

/* Blocks are inlined into loops that fix their sizes, so that a block's sums stay in registers. */
#define BLOCK static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Brings what lies some bytes on towards the second-level cache: used where arithmetic or the order of
 * reading keeps the prefetchers from running ahead; elsewhere it only costs. */
BLOCK void fetch_ahead(const void *p, ptrdiff_t bytes) {
    __builtin_prefetch((const void *)((uintptr_t)p + (uintptr_t)bytes), 0, 2);
}

#include "load_tmpl.h"

/* ---- outer: rank-1 updates ---- */

enum {
    CHAINS = 8, /* sums in a block, at least: two products a cycle, each done four cycles later */
    MOST_VECTORS = FEW_VECTORS > ROW_VECTORS ? FEW_VECTORS : ROW_VECTORS,
    MOST_COLUMNS = COLUMNS > (int)CHAINS ? COLUMNS : (int)CHAINS,
};

/* Lines of 64 bytes, and products: about what a core reads from memory in the meantime. */
enum { FETCH_LINES = 8, FETCH_EVERY = 16 };

/* In the order in which they lie: asked for in the order in which blocks take them, they come a third slower. */
BLOCK void fetch_lines(struct gqa_fetch *next, int64_t lines) {
    while (lines > 0 && next->rows > 0) {
        const int64_t left = (next->width - next->at + 63) / 64, some = lines < left ? lines : left;
        for (int64_t i = 0; i < some; i++) __builtin_prefetch(next->row + next->at + 64 * i, 0, 2);
        lines -= some, next->at += 64 * some;
        if (some == left) next->at = 0, next->row += next->step, next->rows--;
    }
}

/* One block of c: `columns` rows of `vectors` vectors, or of only `rest` lanes when rest > 0.  `adds` (to c) goes
 * without scale.  The sums are this function's own: handed to another one, though inlined, gcc 12 keeps them in
 * memory (30 % slower). */
BLOCK void outer_block(real *c, ptrdiff_t c_stride, const real *scale, const bool adds, const char *a, ptrdiff_t a_step,
                       const enum gqa_dtype dtype, const int vectors, const int rest, const real *b, ptrdiff_t b_n,
                       ptrdiff_t b_t, const int columns, int count, struct gqa_fetch *next) {
    vec sum[MOST_COLUMNS][MOST_VECTORS];
    UNROLL for (int n = 0; n < columns; n++)
        UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vset(0);
    for (ptrdiff_t t = 0, end; t < count; t = end) {
        const bool fetching = next && next->rows > 0;
        end = fetching && count - t > FETCH_EVERY ? t + FETCH_EVERY : count;
        if (fetching) fetch_lines(next, FETCH_LINES);
        for (; t < end; t++) {
            vec x[MOST_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++)
                x[v] = rest ? row_rest(a + t * a_step, 0, rest, dtype) : row_vec(a + t * a_step, v * LANES, dtype);
            UNROLL for (int n = 0; n < columns; n++) {
                const vec y = vset(b[n * b_n + t * b_t]);
                UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vfma(x[v], y, sum[n][v]);
            }
        }
    }
    UNROLL for (int n = 0; n < columns; n++)
        UNROLL for (int v = 0; v < vectors; v++) {
            real *to = c + n * c_stride + v * LANES;
            if (adds)
                vstore(to, vadd(vload(to), sum[n][v]));
            else
                vstore(to, scale ? vfma(vload(to), vload(scale + v * LANES), sum[n][v]) : sum[n][v]);
        }
}

/* All n rows of c for one strip of lanes; whichever of b's strides is 1 becomes a constant. */
BLOCK void outer_strip(real *c, const real *scale, const real *a, const int vectors, const real *b, ptrdiff_t b_n,
                       ptrdiff_t b_t, int n, int count, struct gqa_fetch *next) {
    const ptrdiff_t step = ROW_TILE * sizeof(real);
    const char *from = (const char *)a;
    UNROLL for (int columns = MOST_COLUMNS; columns > 0; columns /= 2) {
        if (columns * vectors > COLUMNS * ROW_VECTORS) continue; /* more than fits the registers */
        for (; n >= columns; n -= columns, c += columns * ROW_TILE, b += columns * b_n) {
            if (b_t == 1)
                outer_block(c, ROW_TILE, scale, false, from, step, OWN, vectors, 0, b, b_n, 1, columns, count, next);
            else
                outer_block(c, ROW_TILE, scale, false, from, step, OWN, vectors, 0, b, 1, b_t, columns, count, next);
        }
    }
}

static void outer(void *c, const void *scale, const void *a, int lanes, const void *b, ptrdiff_t b_n, ptrdiff_t b_t,
                  int n, int count, struct gqa_fetch *next) {
    int lane = 0;
    const real *unit = scale;
    UNROLL for (int vectors = ROW_VECTORS; vectors > 0; vectors--)
        for (; lanes - lane >= vectors * LANES; lane += vectors * LANES)
            outer_strip((real *)c + lane, unit ? unit + lane : NULL, (const real *)a + lane, vectors, b, b_n, b_t, n,
                        count, next);
}

/* The same sum of one vector, or of only `rest` lanes, without what has a factor 0. */
BLOCK vec careful_sum(const char *a, ptrdiff_t a_step, const enum gqa_dtype dtype, int rest, const real *b,
                      ptrdiff_t b_t, int count) {
    vec sum = vset(0);
    for (ptrdiff_t t = 0; t < count; t++, a += a_step) {
        const real y = b[t * b_t];
        const vec x = rest < LANES ? row_rest(a, 0, rest, dtype) : row_vec(a, 0, dtype);
        const vec with = vfma(x, vset(y), sum);
        sum = y == 0 ? sum : vselect(veq(x, vset(0)), sum, with);
    }
    return sum;
}

static void outer_careful(void *c_, const void *scale_, const void *a_, int lanes, const void *b_, ptrdiff_t b_n,
                          ptrdiff_t b_t, int n, int count, struct gqa_fetch *next) {
    const ptrdiff_t step = ROW_TILE * sizeof(real);
    (void)next; /* rare, and slow enough */
    const real *b = b_, *scale = scale_;
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane += LANES) {
            real *to = (real *)c_ + i * ROW_TILE + lane;
            const char *a = (const char *)((const real *)a_ + lane);
            const vec sum = careful_sum(a, step, OWN, LANES, b + i * b_n, b_t, count);
            vstore(to, scale ? vfma(vload(to), vload(scale + lane), sum) : sum);
        }
}

#include "few_tmpl.h"
#ifdef PAIRS
#include "pairs_tmpl.h"
#endif

/* ---- soften: scores to weights ---- */

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

static void soften_row(real *s, const real *bias, const struct finish *f, int keys, real *m, real *l, real *alpha) {
    const vec old = vset(*m);
    vec top = old, sum = vset(0);
    for (int j = 0; j < keys; j += LANES) {
        const vec x = finished(vload(s + j), bias ? bias + j : NULL, vadd(vset((real)j), viota()), f);
        vstore(s + j, x);
        top = vmax(x, top);
    }
    top = vset(largest(top));
    const vec shift = shift_of(top);
    for (int j = 0; j < keys; j += LANES) {
        const vec p = vexp(vsub(vload(s + j), shift));
        vstore(s + j, p);
        sum = vadd(sum, p);
    }
    const real fade = first_of(vexp(vsub(old, shift)));
    *m = first_of(top);
    *l = *l * fade + total(sum);
    *alpha = fade;
}

static void soften_rows(void *s, const void *bias, const void *lo, const void *hi, int rows, int keys, double softcap,
                        void *m, void *l, void *alpha) {
    for (int r = 0; r < rows; r++) {
        const struct finish f =
            finish_of(softcap, vset(lo ? ((const real *)lo)[r] : 0), vset(hi ? ((const real *)hi)[r] : (real)keys));
        soften_row((real *)s + r * GQA_KEY_TILE, bias ? (const real *)bias + r * GQA_KEY_TILE : NULL, &f, keys,
                   (real *)m + r, (real *)l + r, (real *)alpha + r);
    }
}

/* ---- join, blend, divide: putting parts together ---- */

static void join(void *m_, void *l_, const void *other_m, const void *other_l, void *weight, void *other_weight,
                 int lanes) {
    for (int lane = 0; lane < lanes; lane += LANES) {
        real *m = (real *)m_ + lane, *l = (real *)l_ + lane;
        const vec mine = vload(m), other = vload((const real *)other_m + lane);
        const vec top = vmax(mine, other), shift = shift_of(top);
        const vec w = vexp(vsub(mine, shift)), other_w = vexp(vsub(other, shift));
        vstore(m, top);
        vstore(l, vfma(vload((const real *)other_l + lane), other_w, vmul(vload(l), w)));
        vstore((real *)weight + lane, w);
        vstore((real *)other_weight + lane, other_w);
    }
}

/* The statistic that belongs to row i, or to the vector at lane. */
BLOCK vec statistic(const void *x, int i, int lane, bool rows) {
    return rows ? vset(((const real *)x)[i]) : vload((const real *)x + lane);
}

static void tilt(void *bias, ptrdiff_t stride, int n, int lanes, const void *slope, const void *row_at,
                 const void *key_at, bool rows) {
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane += LANES) {
            real *to = (real *)bias + i * stride + lane;
            const vec away = vsub(statistic(row_at, i, lane, rows), statistic(key_at, i, lane, !rows));
            const vec distance = vmax(away, vsub(vset(0), away));
            vstore(to, vsub(vload(to), vmul(statistic(slope, i, lane, rows), distance)));
        }
}

static void blend(void *c, const void *d, ptrdiff_t stride, int n, int lanes, const void *weight,
                  const void *other_weight, bool rows) {
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane += LANES) {
            real *to = (real *)c + i * stride + lane;
            vec x = vmul(vload(to), statistic(weight, i, lane, rows));
            if (d) x = vfma(vload((const real *)d + i * stride + lane), statistic(other_weight, i, lane, rows), x);
            vstore(to, x);
        }
}

/* x / by from about 1 / by: a product, and what it leaves.  A division costs a CPU sixteen cycles. */
BLOCK vec quotient(vec x, vec by, vec inverse) {
    if (LANES == 1) return vdiv(x, by); /* its vfma rounds twice */
    const vec near = vmul(x, inverse), rest = vfma(vsub(vset(0), near), by, x);
    return vselect(veq(rest, rest), vfma(rest, inverse, near), near); /* an infinity leaves NaN */
}

static void divide(void *c, ptrdiff_t stride, int n, int lanes, const void *l, bool rows) {
    const vec zero = vset(0);
    for (int lane = 0; lane < lanes; lane += LANES) {
        vec by = zero, inverse = zero;
        for (int i = 0; i < n; i++) {
            real *to = (real *)c + i * stride + lane;
            if (rows || i == 0) by = statistic(l, i, lane, rows), inverse = vdiv(vset(1), by);
            vstore(to, vselect(veq(by, zero), zero, quotient(vload(to), by, inverse)));
        }
    }
}

/* A square of vectors, its rows made columns: each step interleaves its halves. */
BLOCK void turn_square(real *to, ptrdiff_t to_stride, const real *from, ptrdiff_t from_stride) {
    vec x[LANES], y[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = vload(from + i * from_stride);
    UNROLL for (int step = 1; step < LANES; step *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = vzip_low(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = vzip_high(x[i], x[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) vstore(to + i * to_stride, x[i]);
}

static void turn(void *to, ptrdiff_t to_stride, const void *from, ptrdiff_t from_stride, int n, int width) {
    for (int i = 0; i < n; i += LANES)
        for (int t = 0; t < width; t += LANES)
            turn_square((real *)to + t * to_stride + i, to_stride, (const real *)from + i * from_stride + t,
                        from_stride);
}

BLOCK bool rows_finite(const char *row, ptrdiff_t step, const enum gqa_dtype dtype, int n, int width) {
    vec seen = vset(0); /* 0 * x is NaN unless x is finite */
    for (int i = 0; i < n; i++, row += step)
        for (int t = 0; t < width; t += LANES) seen = vfma(row_some(row, t, width, dtype), vset(0), seen);
    return total(seen) == 0;
}

static bool all_finite(const void *x, ptrdiff_t stride, enum gqa_dtype dtype, int n, int width) {
    const ptrdiff_t step = stride * size_of(dtype);
    switch (streamed(dtype)) {
    case GQA_INT8: return true;
    case GQA_FLOAT16: return rows_finite(x, step, GQA_FLOAT16, n, width);
    case GQA_BFLOAT16: return rows_finite(x, step, GQA_BFLOAT16, n, width);
    default: return rows_finite(x, step, OWN, n, width);
    }
}

const struct gqa_kernels KERNELS = {
    .real_size = sizeof(real),
    .lanes = LANES,
    .row_tile = ROW_TILE,
    .few_rows = FEW_ROWS,
    .outer = outer,
    .outer_careful = outer_careful,
    .outer_few = outer_few,
    .outer_few_careful = outer_few_careful,
    .dot = dot,
#ifdef PAIRS
    .outer_pairs = outer_pairs,
    .dot_pairs = dot_pairs,
#endif
    .soften_lanes = soften_lanes,
    .soften_rows = soften_rows,
    .tilt = tilt,
    .join = join,
    .blend = blend,
    .divide = divide,
    .all_finite = all_finite,
    .load = load,
    .store = store,
    .multiply = multiply,
    .turn = turn,
};
