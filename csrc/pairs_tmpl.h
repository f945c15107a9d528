/* pairs_tmpl.h: bfloat16 queries against bfloat16 keys, two numbers at a time, for vocabularies that have a word
 * for it (PAIRS).  Both lie as they came, so a score is scaled when its sum is done.
 *
 * Products are exact and sums are floats, as ever, but the instruction takes a subnormal for 0, on both sides.
 * Included by kernels_tmpl.h; the table's outer_pairs and dot_pairs. */
/* clang-format off */

/* One block of c: `columns` rows of `vectors` vectors. */
BLOCK void outer_pairs_block(real *c, const uint32_t *a, const int vectors, const char *b, ptrdiff_t b_step,
                             const int columns, int count, vec scale) {
    vec sum[COLUMNS][ROW_VECTORS];
    UNROLL for (int n = 0; n < columns; n++)
        UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vset(0);
    for (ptrdiff_t t = 0; t < count; t++) {
        pairs x[ROW_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) x[v] = vload_pairs(a + t * ROW_TILE + v * LANES);
        UNROLL for (int n = 0; n < columns; n++) {
            const pairs y = vset_pair(b + n * b_step + t * (ptrdiff_t)sizeof(uint32_t));
            UNROLL for (int v = 0; v < vectors; v++) sum[n][v] = vfma_pairs(x[v], y, sum[n][v]);
        }
    }
    UNROLL for (int n = 0; n < columns; n++)
        UNROLL for (int v = 0; v < vectors; v++) vstore(c + n * ROW_TILE + v * LANES, vmul(sum[n][v], scale));
}

static void outer_pairs(void *c_, double scale, const void *a_, int lanes, const void *b_, ptrdiff_t b_stride, int n,
                        int count) {
    const ptrdiff_t step = 2 * b_stride;
    const vec by = vset(clamped(scale));
    int lane = 0;
    UNROLL for (int vectors = ROW_VECTORS; vectors > 0; vectors--)
        for (; lanes - lane >= vectors * LANES; lane += vectors * LANES) {
            real *c = (real *)c_ + lane;
            const uint32_t *a = (const uint32_t *)a_ + lane;
            const char *b = b_;
            int left = n;
            UNROLL for (int columns = COLUMNS; columns > 0; columns /= 2)
                for (; left >= columns; left -= columns, c += columns * ROW_TILE, b += columns * step)
                    outer_pairs_block(c, a, vectors, b, step, columns, count, by);
        }
}

/* DOT_KEYS keys at a time; head_dim counts numbers, of which the last vector may hold a part. */
BLOCK void dot_pairs_block(real *s, const uint16_t *q, ptrdiff_t q_stride, const int rows,
                           const char *const k[DOT_KEYS], int head_dim, vec scale, struct gqa_fetch *next) {
    vec sum[DOT_ROWS][DOT_KEYS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < DOT_KEYS; j++) sum[r][j] = vset(0);
    for (int j = 0; j < DOT_KEYS; j++) fetch_lines(next);
    for (int t = 0; t < head_dim; t += 2 * LANES) {
        pairs x[DOT_KEYS];
        UNROLL for (int j = 0; j < DOT_KEYS; j++) {
            const char *at = k[j] + 2 * t;
            x[j] = head_dim - t < 2 * LANES ? vload_pairs_n(at, (head_dim - t) / 2) : vload_pairs(at);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const pairs y = vload_pairs(q + r * q_stride + t);
            UNROLL for (int j = 0; j < DOT_KEYS; j++) sum[r][j] = vfma_pairs(x[j], y, sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        vstore_sums(s + r * GQA_KEY_TILE, vmul(sum[r][0], scale), vmul(sum[r][1], scale), vmul(sum[r][2], scale),
                    vmul(sum[r][3], scale));
}

static void dot_pairs(void *s_, double scale, const void *q_, ptrdiff_t q_stride, int rows, const void *k_,
                      ptrdiff_t k_stride, int keys, int head_dim, ptrdiff_t ahead) {
    const vec by = vset(clamped(scale));
    struct gqa_fetch next = rows_ahead(k_, 2 * k_stride, keys, 2 * head_dim, dot_blocks(rows), ahead);
    for (int j = 0; j < keys; j += DOT_KEYS) {
        const char *k[DOT_KEYS];
        nearest_keys(k, k_, 2 * k_stride, j, keys);
        real *s = (real *)s_ + j;
        const uint16_t *q = q_;
        int left = rows;
        UNROLL for (int block = DOT_ROWS; block > 0; block /= 2)
            for (; left >= block; left -= block, s += block * GQA_KEY_TILE, q += block * q_stride)
                dot_pairs_block(s, q, q_stride, block, k, head_dim, by, &next);
    }
}
