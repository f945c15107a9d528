/* matrices_tmpl.h: bfloat16 queries, keys and values as whole matrices, for vocabularies that have words for them
 * (MATRICES).  Many rows only: few are bound by memory.
 *
 * Scores are as in pairs_tmpl.h, of keys in whole lines.  A weight goes as the sum of three bfloat16, which is it;
 * values, which must lie key beside key, are turned once for all row tiles.  A register's sums are grouped by where
 * keys lie in their tile, so a step begins with the tile's first key.
 * Included by kernels_tmpl.h; the table's outer_pairs, turn_pairs and weigh_pairs. */
/* clang-format off */

enum {
    PAIR = 4,                /* bytes */
    SPLIT = 3,               /* bfloat16 that make a float */
    MOST = MATRICES * MATRIX /* rows of left factors */
};

BLOCK int blocks_of(int rows) { return rows < MOST ? (rows + MATRIX - 1) / MATRIX : MATRICES; }

/* One strip of c: `rows` rows of b times a. */
BLOCK void outer_pairs_strip(real *c, vec scale, const char *a, const char *b, ptrdiff_t b_step, int rows, int count) {
    const ptrdiff_t a_step = ROW_TILE * PAIR;
    const int blocks = blocks_of(rows);
    mzero(blocks);
    for (int t = 0; t < count; t += MATRIX) {
        mleft(b + t * PAIR, b_step, blocks);
        mfma(a + t * a_step, a_step, blocks);
    }
    mstore((char *)c, ROW_TILE * sizeof(real), blocks);
    for (int r = 0; r < rows; r++) vstore(c + r * ROW_TILE, vmul(vload(c + r * ROW_TILE), scale));
}

static void outer_pairs(void *c, double scale, const void *a, int lanes, const void *b, ptrdiff_t b_stride, int n,
                        int count) {
    const vec by = vset(clamped(scale));
    for (int i = 0; i < n; i += MOST) {
        const int rows = n - i < MOST ? n - i : MOST;
        if (i == 0 || rows % MATRIX) mbegin(rows);
        for (int lane = 0; lane < lanes; lane += LANES)
            outer_pairs_strip((real *)c + i * ROW_TILE + lane, by, (const char *)a + lane * PAIR,
                              (const char *)b + 2 * i * b_stride, 2 * b_stride, rows, count);
    }
    mend();
}

/* MATRIX pairs of keys by LANES value dims. */
BLOCK bool turn_pairs_square(char *to, const char *v, ptrdiff_t step, int keys, int width) {
    bool finite = true;
    vec x[LANES];
    UNROLL for (int i = 0; i < LANES; i++) {
        const char *row = v + 2 * i * step;
        const int first = 2 * i < keys ? width : 0, second = 2 * i + 1 < keys ? width : 0;
        x[i] = vfinite_bits(vzip_halves(row, first, row + step, second), &finite);
    }
    turn_vectors(x);
    UNROLL for (int i = 0; i < LANES; i++) vstore((real *)(void *)(to + i * GQA_TURNED * 2), x[i]);
    return finite;
}

static bool turn_pairs(void *to, const void *v, ptrdiff_t stride, int keys, int width) {
    bool finite = true;
    for (int d = 0; d < width; d += LANES)
        for (int t = 0; t < GQA_TURNED; t += 2 * MATRIX)
            finite &= turn_pairs_square((char *)to + (d * (ptrdiff_t)GQA_TURNED + t) * 2, (const char *)v + (t * stride + d) * 2,
                                        2 * stride, keys - t, width - d < LANES ? width - d : LANES);
    return finite;
}

/* A vector of the weights of two keys: their first 8 bits, and twice what is left of them. */
BLOCK void split_weights(uint32_t to[SPLIT][LANES], const real *s, int keys) {
    vec first = keys > 0 ? vload(s) : vset(0), second = keys > 1 ? vload(s + ROW_TILE) : vset(0);
    UNROLL for (int i = 0; i < SPLIT; i++) {
        vstore_tops(to[i], first, second);
        first = vsub(first, vtop(first)), second = vsub(second, vtop(second));
    }
}

/* One strip of c. */
BLOCK void weigh_pairs_strip(real *c, vec scale, const real *s, const char *turned, int n, int count) {
    _Alignas(64) uint32_t weights[GQA_KEY_TILE / 2][SPLIT][LANES];
    _Alignas(64) real sums[MOST][LANES];
    const ptrdiff_t step = GQA_TURNED * 2;
    const int all = (count + 2 * MATRIX - 1) / (2 * MATRIX) * MATRIX; /* pairs */
    for (int t = 0; t < all; t++) split_weights(weights[t], s + 2 * t * ROW_TILE, count - 2 * t);
    for (int d = 0; d < n; d += MOST) {
        const int rows = n - d < MOST ? n - d : MOST, blocks = blocks_of(rows);
        mzero(blocks);
        for (int t = 0; t < all; t += MATRIX) {
            mleft(turned + d * step + t * PAIR, step, blocks);
            for (int i = 0; i < SPLIT; i++) mfma((const char *)weights[t][i], sizeof *weights, blocks);
        }
        mstore((char *)sums, sizeof *sums, blocks);
        for (int r = 0; r < rows; r++, c += ROW_TILE) vstore(c, vfma(vload(c), scale, vload(sums[r])));
    }
}

static void weigh_pairs(void *c, const void *scale, const void *s, int lanes, const void *turned, int n, int count) {
    mbegin(MOST);
    for (int lane = 0; lane < lanes; lane += LANES)
        weigh_pairs_strip((real *)c + lane, vload((const real *)scale + lane), (const real *)s + lane, turned, n, count);
    mend();
}
