/* few_tmpl.h: few rows against keys and values as they lie in memory, in the type that they have.
 *
 * Decoding reads every key and value once and is bound by that, so here a row is widened in registers, on its
 * way from memory to the product; the many-rows form spends so long on each tile that it takes reals only.
 * Included by kernels_tmpl.h; the table's dot, outer_few and outer_few_careful. */
/* clang-format off */

/* ---- outer_few: rows of values, weighted ---- */

/* A few rows of c, all their lanes, in strips as wide as registers allow: a row of a is read
 * whole before the next, which is how memory streams. */
BLOCK void few_strips(real *c, ptrdiff_t c_stride, const char *a, ptrdiff_t a_step, const enum gqa_dtype dtype,
                      int lanes, const real *b, ptrdiff_t b_n, const int widest, const int columns, int count,
                      struct gqa_fetch *next) {
    int lane = 0;
    UNROLL for (int vectors = widest; vectors > 0; vectors /= 2)
        for (; lanes - lane >= vectors * LANES; lane += vectors * LANES)
            outer_block(c + lane, c_stride, NULL, true, a + lane * size_of(dtype), a_step, dtype, vectors, 0, b, b_n,
                        1, columns, count, next);
    if (lane < lanes)
        outer_block(c + lane, c_stride, NULL, true, a + lane * size_of(dtype), a_step, dtype, 1, lanes - lane, b, b_n,
                    1, columns, count, NULL);
}

/* Narrow rows go twice as many columns wide in strips of half the width: each is widened for twice as many products. */
BLOCK void few_columns(real *c, ptrdiff_t c_stride, const char *a, ptrdiff_t a_step, const enum gqa_dtype dtype,
                       int lanes, const real *b, ptrdiff_t b_n, int n, int count, struct gqa_fetch *next) {
    if (dtype != OWN)
        for (; n >= 2 * FEW_COLUMNS; n -= 2 * FEW_COLUMNS, c += 2 * FEW_COLUMNS * c_stride, b += 2 * FEW_COLUMNS * b_n)
            few_strips(c, c_stride, a, a_step, dtype, lanes, b, b_n, FEW_VECTORS / 2, 2 * FEW_COLUMNS, count, next);
    UNROLL for (int columns = FEW_COLUMNS; columns > 0; columns /= 2)
        for (; n >= columns; n -= columns, c += columns * c_stride, b += columns * b_n)
            few_strips(c, c_stride, a, a_step, dtype, lanes, b, b_n, FEW_VECTORS, columns, count, next);
}

/* The same, without what has a factor 0. */
BLOCK void careful_columns(real *c, ptrdiff_t c_stride, const char *a, ptrdiff_t a_step, const enum gqa_dtype dtype,
                           int lanes, const real *b, ptrdiff_t b_n, int n, int count) {
    for (int i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane += LANES) {
            real *to = c + i * c_stride + lane;
            const char *strip = a + lane * size_of(dtype);
            vstore(to, vadd(vload(to), careful_sum(strip, a_step, dtype, lanes - lane, b + i * b_n, 1, count)));
        }
}

/* Both forms go by the same pieces, so that a masked NaN changes no bit of a row that masks it. */
BLOCK void few_pieces(real *c, ptrdiff_t c_stride, const char *a, ptrdiff_t a_stride, const enum gqa_dtype dtype,
                      int lanes, const real *b, ptrdiff_t b_n, int n, int count, ptrdiff_t ahead, const bool careful) {
    enum { BLOCK_REALS = FEW_VECTORS * FEW_COLUMNS * LANES };
    const ptrdiff_t step = a_stride * size_of(dtype), width = lanes * size_of(dtype);
    const int blocks = (int)(((int64_t)n * lanes + BLOCK_REALS - 1) / BLOCK_REALS);
    for (int t = 0, some; t < count; t += some, a += some * step, b += some) {
        some = count - t < GQA_FEW_PIECE ? count - t : GQA_FEW_PIECE;
        struct gqa_fetch next = rows_ahead(a, step, some, width, blocks, ahead);
        if (careful)
            careful_columns(c, c_stride, a, step, dtype, lanes, b, b_n, n, some);
        else
            few_columns(c, c_stride, a, step, dtype, lanes, b, b_n, n, some, &next);
    }
}

BLOCK void few_products(void *c, ptrdiff_t c_stride, const void *a, ptrdiff_t a_stride, enum gqa_dtype dtype, int lanes,
                        const void *b, ptrdiff_t b_n, int n, int count, ptrdiff_t ahead, const bool careful) {
    switch (streamed(dtype)) {
    case GQA_FLOAT16:
        few_pieces(c, c_stride, a, a_stride, GQA_FLOAT16, lanes, b, b_n, n, count, ahead, careful);
        break;
    case GQA_BFLOAT16:
        few_pieces(c, c_stride, a, a_stride, GQA_BFLOAT16, lanes, b, b_n, n, count, ahead, careful);
        break;
    case GQA_INT8: few_pieces(c, c_stride, a, a_stride, GQA_INT8, lanes, b, b_n, n, count, ahead, careful); break;
    default: few_pieces(c, c_stride, a, a_stride, OWN, lanes, b, b_n, n, count, ahead, careful);
    }
}

static void outer_few(void *c, ptrdiff_t c_stride, const void *a, ptrdiff_t a_stride, enum gqa_dtype dtype, int lanes,
                      const void *b, ptrdiff_t b_n, int n, int count, ptrdiff_t ahead) {
    few_products(c, c_stride, a, a_stride, dtype, lanes, b, b_n, n, count, ahead, false);
}

static void outer_few_careful(void *c, ptrdiff_t c_stride, const void *a, ptrdiff_t a_stride, enum gqa_dtype dtype,
                              int lanes, const void *b, ptrdiff_t b_n, int n, int count, ptrdiff_t ahead) {
    few_products(c, c_stride, a, a_stride, dtype, lanes, b, b_n, n, count, ahead, true);
}

/* ---- dot: keys as they lie ---- */

enum { DOT_KEYS = 4 }; /* what vstore_sums takes */

/* `side` keys at a time, 1: memory is read in one ascending stream; DOT_KEYS: a vector of q is loaded once for several
 * products, and sums do not wait for one another. */
BLOCK void dot_block(real *s, const real *q, ptrdiff_t q_stride, const int rows, const char *const k[DOT_KEYS],
                     const enum gqa_dtype dtype, int head_dim, const int side, struct gqa_fetch *next) {
    const int whole = head_dim - head_dim % LANES;
    vec sum[DOT_ROWS][DOT_KEYS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < DOT_KEYS; j++) sum[r][j] = vset(0);
    UNROLL for (int first = 0; first < DOT_KEYS; first += side) {
        for (int j = 0; j < side; j++) fetch_lines(next);
        UNROLL for (int rest = 0; rest < 2; rest++) /* whole vectors, then the last lanes */
            for (int t = rest ? whole : 0; t < (rest ? head_dim : whole); t += LANES) {
                vec x[DOT_KEYS];
                UNROLL for (int j = 0; j < side; j++)
                    x[j] = rest ? row_rest(k[first + j], t, head_dim - t, dtype) : row_vec(k[first + j], t, dtype);
                UNROLL for (int r = 0; r < rows; r++) {
                    const vec y = vload(q + r * q_stride + t);
                    UNROLL for (int j = 0; j < side; j++) sum[r][first + j] = vfma(x[j], y, sum[r][first + j]);
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++) vstore_sums(s + r * GQA_KEY_TILE, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

/* How many blocks read each key: of DOT_ROWS rows, then of half as many. */
BLOCK int dot_blocks(int rows) { return rows / DOT_ROWS + __builtin_popcount((unsigned)(rows % DOT_ROWS)); }

/* The keys from j on; past the last key the last again, for scores that nobody reads. */
BLOCK void nearest_keys(const char *k[DOT_KEYS], const char *first, ptrdiff_t step, int j, int keys) {
    for (int i = 0; i < DOT_KEYS; i++) k[i] = first + (j + i < keys ? j + i : keys - 1) * step;
}

/* Up to OWN_ALONE rows of reals, or NARROW_ALONE of others, take keys one by one: so few are bound by memory alone. */
BLOCK void dot_keys(real *s_, const real *q_, ptrdiff_t q_stride, int rows, const char *first, ptrdiff_t step,
                    const enum gqa_dtype dtype, int keys, int head_dim, ptrdiff_t ahead) {
    const ptrdiff_t width = head_dim * size_of(dtype);
    const int alone = dtype == OWN ? OWN_ALONE : NARROW_ALONE;
    struct gqa_fetch next = rows_ahead(first, step, keys, width, dot_blocks(rows), ahead);
    for (int j = 0; j < keys; j += DOT_KEYS) {
        const char *k[DOT_KEYS];
        nearest_keys(k, first, step, j, keys);
        real *s = s_ + j;
        const real *q = q_;
        int left = rows;
        UNROLL for (int block = DOT_ROWS; block > 0; block /= 2)
            for (; left >= block; left -= block, s += block * GQA_KEY_TILE, q += block * q_stride) {
                if (rows > alone)
                    dot_block(s, q, q_stride, block, k, dtype, head_dim, DOT_KEYS, &next);
                else
                    dot_block(s, q, q_stride, block, k, dtype, head_dim, 1, &next);
            }
    }
}

static void dot(void *s, const void *q, ptrdiff_t q_stride, int rows, const void *k, ptrdiff_t k_stride,
                enum gqa_dtype dtype, int keys, int head_dim, ptrdiff_t ahead) {
    const ptrdiff_t step = k_stride * size_of(dtype);
    switch (streamed(dtype)) {
    case GQA_FLOAT16: dot_keys(s, q, q_stride, rows, k, step, GQA_FLOAT16, keys, head_dim, ahead); break;
    case GQA_BFLOAT16: dot_keys(s, q, q_stride, rows, k, step, GQA_BFLOAT16, keys, head_dim, ahead); break;
    case GQA_INT8: dot_keys(s, q, q_stride, rows, k, step, GQA_INT8, keys, head_dim, ahead); break;
    default: dot_keys(s, q, q_stride, rows, k, step, OWN, keys, head_dim, ahead);
    }
}
