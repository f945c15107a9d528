/* view.c: the loader.  Type, stride, alignment, byte order, blocks and rings end here.
 * Called by tile.c and merge.c. */
#include "view.h"

#include <string.h>

static bool lies_plainly(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                         int64_t width) {
    const int64_t size = (int64_t)kernels->real_size;
    const enum gqa_dtype own = kernels->real_size == sizeof(float) ? GQA_FLOAT32 : GQA_FLOAT64;
    return operand->dtype == own && !operand->swapped && (operand->column == size || width <= 1) &&
           operand->row % size == 0 && (uintptr_t)at % (uintptr_t)size == 0;
}

/* To scratch (count, width). */
static struct gqa_rows load_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *row,
                                 int64_t count, int64_t width, void *scratch) {
    const bool joined = operand->row == width * operand->column; /* each row follows the last: as one long row */
    const int64_t rows = joined ? 1 : count, length = joined ? count * width : width;
    for (int64_t i = 0; i < rows; i++)
        kernels->load((char *)scratch + i * width * (int64_t)kernels->real_size, 1, row + i * operand->row,
                      operand->column, operand->dtype, operand->swapped, (int)length);
    return (struct gqa_rows){scratch, (ptrdiff_t)width};
}

struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch) {
    const char *row = at + first * operand->row;
    if (lies_plainly(kernels, operand, at, width))
        return (struct gqa_rows){row, (ptrdiff_t)(operand->row / (int64_t)kernels->real_size)};
    return load_rows(kernels, operand, row, count, width, scratch);
}

/* ---- keys of a sequence, which may be those of a cache ---- */

struct gqa_run gqa_view_run(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                            int64_t first, int64_t count) {
    const int64_t row = first % plan->run_rows;
    const char *at = gqa_operand_at(plan, operand, unit->sequence, unit->kv_head) + row * operand->row;
    if (plan->block_table.data) {
        const char *table = gqa_operand_at(plan, &plan->block_table, unit->sequence, 0);
        int64_t block;
        memcpy(&block, table + first / plan->run_rows * plan->block_table.column, sizeof block);
        at += block * operand->block;
    }
    return (struct gqa_run){at, gqa_min(count, plan->run_rows - row)};
}

struct gqa_rows gqa_view_keys(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_unit *unit, int64_t first, int64_t count, int64_t width, void *scratch) {
    const int64_t row_bytes = width * (int64_t)plan->kernels->real_size;
    struct gqa_run run = gqa_view_run(plan, operand, unit, first, count);
    if (run.count == count) return gqa_view_rows(plan->kernels, operand, run.at, 0, count, width, scratch);
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, operand, unit, first + done, count - done);
        load_rows(plan->kernels, operand, run.at, run.count, width, (char *)scratch + done * row_bytes);
    }
    return (struct gqa_rows){scratch, (ptrdiff_t)width};
}

const float *gqa_view_scales(const struct gqa_plan *plan, const struct gqa_operand *scales, const struct gqa_unit *unit,
                             int64_t first, int64_t count, float *scratch) {
    struct gqa_run run;
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, scales, unit, first + done, count - done);
        for (int64_t i = 0; i < run.count; i++) memcpy(&scratch[done + i], run.at + i * scales->row, sizeof *scratch);
    }
    return scratch;
}
