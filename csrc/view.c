/* view.c: the loader.  Type, stride, alignment and byte order end here.
 * Called by tile.c and merge.c. */
#include "view.h"

static int64_t size_of(enum gqa_dtype dtype) {
    return dtype == GQA_INT8 ? 1 : dtype == GQA_FLOAT32 ? 4 : dtype == GQA_FLOAT64 ? 8 : 2;
}

static bool lies_plainly(const struct gqa_operand *operand, const char *at, int64_t width) {
    const int64_t size = size_of(operand->dtype);
    const bool aligned = size == 1 || (operand->row % size == 0 && (uintptr_t)at % (uintptr_t)size == 0);
    return !operand->swapped && (operand->column == size || width <= 1) && aligned;
}

static struct gqa_rows in_place(const struct gqa_operand *operand, const char *at, int64_t first) {
    return (struct gqa_rows){at + first * operand->row, (ptrdiff_t)(operand->row / size_of(operand->dtype)),
                             operand->dtype};
}

/* To scratch (count, width), as reals. */
static struct gqa_rows loaded(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch) {
    const char *row = at + first * operand->row;
    const bool joined = operand->row == width * operand->column; /* each row follows the last: as one long row */
    const int64_t rows = joined ? 1 : count, length = joined ? count * width : width;
    for (int64_t i = 0; i < rows; i++)
        kernels->load((char *)scratch + i * width * (int64_t)kernels->real_size, 1, row + i * operand->row,
                      operand->column, operand->dtype, operand->swapped, (int)length);
    return (struct gqa_rows){scratch, (ptrdiff_t)width, gqa_own_dtype(kernels)};
}

struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch) {
    if (operand->dtype == gqa_own_dtype(kernels) && lies_plainly(operand, at, width))
        return in_place(operand, at, first);
    return loaded(kernels, operand, at, first, count, width, scratch);
}

struct gqa_rows gqa_stream_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                                int64_t first, int64_t count, int64_t width, void *scratch) {
    if (gqa_streams(kernels, operand->dtype) && lies_plainly(operand, at, width)) return in_place(operand, at, first);
    return loaded(kernels, operand, at, first, count, width, scratch);
}
