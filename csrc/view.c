/* view.c: the loader.  Type, stride, alignment and byte order end here.
 * Called by tile.c and merge.c. */
#include "view.h"

static bool lies_plainly(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                         int64_t width) {
    const int64_t size = (int64_t)kernels->real_size;
    const enum gqa_dtype own = kernels->real_size == sizeof(float) ? GQA_FLOAT32 : GQA_FLOAT64;
    return operand->dtype == own && !operand->swapped && (operand->column == size || width <= 1) &&
           operand->row % size == 0 && (uintptr_t)at % (uintptr_t)size == 0;
}

struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch) {
    const char *row = at + first * operand->row;
    if (lies_plainly(kernels, operand, at, width))
        return (struct gqa_rows){row, (ptrdiff_t)(operand->row / (int64_t)kernels->real_size)};
    const bool joined = operand->row == width * operand->column; /* each row follows the last: as one long row */
    const int64_t rows = joined ? 1 : count, length = joined ? count * width : width;
    for (int64_t i = 0; i < rows; i++)
        kernels->load((char *)scratch + i * width * (int64_t)kernels->real_size, 1, row + i * operand->row,
                      operand->column, operand->dtype, operand->swapped, (int)length);
    return (struct gqa_rows){scratch, (ptrdiff_t)width};
}
