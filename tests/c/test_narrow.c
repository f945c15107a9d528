/* test_narrow.c: rows of halves and int8 that the few-rows kernels widen themselves give the same bits as
 * the same rows loaded to reals first; and products cut where kernels.h allows it the same bits as whole.
 *
 * Built and run as test_kernels.c is; the reals' own products are judged there. */
#include "kernel_check.h"

static const enum gqa_dtype narrow[] = {GQA_FLOAT16, GQA_BFLOAT16, GQA_INT8};

static ptrdiff_t bytes_of(enum gqa_dtype dtype) { return dtype == GQA_INT8 ? 1 : 2; }

/* Rows in a narrow type, at an odd address, and the same as reals. */
struct rows {
    enum gqa_dtype dtype;
    int count, width;
    ptrdiff_t stride;
    char *memory, *data;
    void *reals;
};

static struct rows draw_rows(enum gqa_dtype dtype, int count, int width, enum kind kind) {
    struct rows r = {.dtype = dtype, .count = count, .width = width, .stride = width + 3};
    const ptrdiff_t elements = (count - 1) * r.stride + width;
    r.memory = malloc((size_t)(elements * bytes_of(dtype) + 1));
    if (!r.memory) exit(3);
    r.data = r.memory + 1;
    r.reals = reals(elements, 0);
    for (ptrdiff_t i = 0; i < elements; i++) {
        if (dtype == GQA_INT8) {
            r.data[i] = (char)(int8_t)(256 * chance() - 128);
        } else {
            void *x = reals(1, value_of(kind));
            kernels->store(r.data + 2 * i, 2, dtype, false, x, 1);
            free(x);
        }
    }
    kernels->load(r.reals, r.data, bytes_of(dtype), dtype, false, (int)elements);
    return r;
}

static void free_rows(struct rows *r) { free(r->memory), free(r->reals); }

static void expect_same_bits(const char *what, const void *got, const void *wanted, ptrdiff_t count) {
    if (!bad[0] && memcmp(got, wanted, (size_t)count * kernels->real_size))
        snprintf(bad, sizeof bad, "%s differs", what);
}

static void test_dot_of(enum gqa_dtype dtype, int rows, int keys, int head_dim, enum kind kind) {
    const ptrdiff_t q_stride = padded(head_dim), room = rows * GQA_KEY_TILE;
    struct rows k = draw_rows(dtype, keys, head_dim, kind);
    void *q = reals(rows * q_stride, 0), *got = reals(room, 0), *wanted = reals(room, 0);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < head_dim; t++) put(q, r * q_stride + t, value_of(RANDOM));
    kernels->dot(got, q, q_stride, rows, k.data, k.stride, dtype, keys, head_dim, -GQA_FETCH_AHEAD);
    kernels->dot(wanted, q, q_stride, rows, k.reals, k.stride, gqa_own_dtype(kernels), keys, head_dim, 0);
    for (int r = 0; r < rows; r++) {
        const size_t at = (size_t)r * GQA_KEY_TILE * kernels->real_size;
        expect_same_bits("s", (char *)got + at, (char *)wanted + at, keys);
    }
    judge("dot", (int)dtype, rows, keys, head_dim);
    free_rows(&k), free(q), free(got), free(wanted);
}

/* In one call from reals, and in two from narrow rows. */
static void test_outer_of(gqa_outer_few *outer, enum gqa_dtype dtype, int n, int lanes, int count, enum kind kind) {
    const ptrdiff_t c_stride = padded(lanes), room = n * c_stride;
    const int first = count / 2 / GQA_FEW_PIECE * GQA_FEW_PIECE;
    struct rows a = draw_rows(dtype, count, lanes, kind);
    void *b = drawn(n * count, WITH_ZEROS), *got = drawn(room, RANDOM), *wanted = copy_of(got, room);
    outer(wanted, c_stride, a.reals, a.stride, gqa_own_dtype(kernels), lanes, b, count, n, count, 0);
    outer(got, c_stride, a.data, a.stride, dtype, lanes, b, count, n, first, GQA_FETCH_AHEAD);
    outer(got, c_stride, a.data + first * a.stride * bytes_of(dtype), a.stride, dtype, lanes,
          (char *)b + (size_t)first * kernels->real_size, count, n, count - first, 0);
    for (int i = 0; i < n; i++) {
        const size_t at = (size_t)(i * c_stride) * kernels->real_size;
        expect_same_bits("c", (char *)got + at, (char *)wanted + at, lanes);
    }
    judge(outer == kernels->outer_few ? "outer_few" : "outer_few_careful", (int)dtype, n, lanes, count);
    free_rows(&a), free(b), free(got), free(wanted);
}

static void test_finite_of(enum gqa_dtype dtype, int count, int width) {
    static const uint16_t poisons[2][3] = {{0x7c00, 0xfc00, 0x7e01}, {0x7f80, 0xff80, 0x7fc1}}; /* inf, -inf, NaN */
    struct rows x = draw_rows(dtype, count, width, RANDOM);
    if (!kernels->all_finite(x.data, x.stride, dtype, count, width))
        snprintf(bad, sizeof bad, "finite values were not");
    for (int i = 0; i < 3 && dtype != GQA_INT8; i++) {
        memcpy(x.data + 2 * ((count - 1) * x.stride + width - 1), &poisons[dtype == GQA_BFLOAT16][i], 2);
        if (kernels->all_finite(x.data, x.stride, dtype, count, width)) snprintf(bad, sizeof bad, "%d was missed", i);
    }
    judge("all_finite", (int)dtype, count, width, 0);
    free_rows(&x);
}

static void test_table(void) {
    if (!gqa_streams(kernels, GQA_FLOAT16)) return; /* doubles go with doubles */
    for (int type = 0; type < COUNT(narrow); type++)
        for (int n = 0; n < COUNT(few_sizes); n++)
            for (int width = 0; width < COUNT(lane_sizes); width++) {
                const enum kind kind = (n + width) % 2 ? RANDOM : DENORMAL;
                const int keys = key_sizes[(n + 3 * width) % COUNT(key_sizes)];
                test_dot_of(narrow[type], few_sizes[n], keys, lane_sizes[width], kind);
                test_outer_of(kernels->outer_few, narrow[type], few_sizes[n], lane_sizes[width], keys, kind);
                test_outer_of(kernels->outer_few_careful, narrow[type], few_sizes[n], lane_sizes[width], keys, kind);
                test_finite_of(narrow[type], few_sizes[n], lane_sizes[width]);
            }
}

int main(void) { return on_every_table(test_table); }
