/* kernels_tmpl.h: THE algorithm, once.  An isa file includes a vocabulary from simd/,
 * defines KERNELS (the name of the table) and includes this; what each kernel
 * promises stands in kernels.h.
 *
 * A lane's result never depends on its neighbours or on how many there are, and
 * sums over keys run in key order, tile by tile (matrices: in an order that a key's place in
 * its tile gives): that is what makes results the same bits however rows and tiles are grouped. */
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

#include "load_tmpl.h"

/* ---- rows to come ---- */

/* The next lines, of one row at most.  In the order in which they lie: asked for in the order in which blocks take
 * them, they come a third slower.  Few at a time: a burst of 32 stops the products until memory has answered. */
BLOCK void fetch_lines(struct gqa_fetch *next) {
    const int64_t end = next->at + 64 * next->lines < next->width ? next->at + 64 * next->lines : next->width;
    for (; next->at < end; next->at += 64) __builtin_prefetch((const void *)(next->row + (uintptr_t)next->at), 0, 2);
    if (next->at >= next->width) next->at = 0, next->row += (uintptr_t)next->step, next->rows--;
}

/* The rows `ahead` bytes on, none where that is 0.  Each row is read by `blocks`: each asks for its share of the
 * lines. */
BLOCK struct gqa_fetch rows_ahead(const char *row, ptrdiff_t step, int rows, int64_t width, int blocks,
                                  ptrdiff_t ahead) {
    const int lines = ahead && blocks ? (int)((width + 63) / 64 + blocks - 1) / blocks : 0;
    return gqa_rows_to_come((uintptr_t)row + (uintptr_t)ahead, step, lines ? rows : 0, width, lines);
}

/* ---- outer: rank-1 updates ---- */

enum {
    CHAINS = 8, /* sums in a block, where columns last: two products a cycle, each done four cycles later */
    MOST_VECTORS = FEW_VECTORS > ROW_VECTORS ? FEW_VECTORS : ROW_VECTORS,
    MOST_COLUMNS = COLUMNS > (int)CHAINS ? COLUMNS : (int)CHAINS,
};

/* One block of c: `columns` rows of `vectors` vectors, or of only `rest` lanes when rest > 0.  `adds` (to c) goes
 * without scale.  The sums are this function's own: handed to another one, though inlined, gcc 12 keeps them in
 * memory (30 % slower).  Few rows, which add, bring rows ahead nearer with every product, many in one of
 * GQA_FETCH_EVERY. */
BLOCK void outer_block(real *c, ptrdiff_t c_stride, const real *scale, const bool adds, const char *a, ptrdiff_t a_step,
                       const enum gqa_dtype dtype, const int vectors, const int rest, const real *b, ptrdiff_t b_n,
                       ptrdiff_t b_t, const int columns, int count, struct gqa_fetch *next) {
    vec sum[MOST_COLUMNS][MOST_VECTORS];
    UNROLL for (int n = 0; n < columns; n++)
        UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vset(0);
    struct gqa_fetch later = next ? *next : (struct gqa_fetch){0}; /* in registers */
    const bool fetching = later.rows > 0;
    for (ptrdiff_t t = 0; t < count; t++) {
        if (fetching && (adds || t % GQA_FETCH_EVERY == 0)) fetch_lines(&later);
        vec x[MOST_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++)
            x[v] = rest ? row_rest(a + t * a_step, 0, rest, dtype) : row_vec(a + t * a_step, v * LANES, dtype);
        UNROLL for (int n = 0; n < columns; n++) {
            const vec y = vset(b[n * b_n + t * b_t]);
            UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vfma(x[v], y, sum[n][v]);
        }
    }
    if (next) *next = later;
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
#include "soften_tmpl.h" /* with what makes one number of a vector */

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
BLOCK void turn_vectors(vec x[LANES]) {
    vec y[LANES];
    UNROLL for (int step = 1; step < LANES; step *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = vzip_low(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = vzip_high(x[i], x[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

BLOCK void turn_square(real *to, ptrdiff_t to_stride, const real *from, ptrdiff_t from_stride) {
    vec x[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = vload(from + i * from_stride);
    turn_vectors(x);
    UNROLL for (int i = 0; i < LANES; i++) vstore(to + i * to_stride, x[i]);
}

static void turn(void *to, ptrdiff_t to_stride, const void *from, ptrdiff_t from_stride, int n, int width) {
    for (int i = 0; i < n; i += LANES)
        for (int t = 0; t < width; t += LANES)
            turn_square((real *)to + t * to_stride + i, to_stride, (const real *)from + i * from_stride + t,
                        from_stride);
}

#ifdef MATRICES
#include "matrices_tmpl.h"
#endif

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
#if defined(PAIRS)
    .outer_pairs = outer_pairs,
    .dot_pairs = dot_pairs,
#elif defined(MATRICES)
    .outer_pairs = outer_pairs,
    .whole_pairs = true,
    .turn_pairs = turn_pairs,
    .weigh_pairs = weigh_pairs,
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
