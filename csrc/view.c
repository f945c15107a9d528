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

int64_t gqa_piece_end(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                      int64_t first, int64_t end) {
    const int64_t run = gqa_view_run(plan, operand, unit, first, end - first).count;
    return run == end - first ? end : gqa_min(end, first + gqa_max(GQA_PIECE, run - run % GQA_PIECE));
}

/* Multiplies rows of reals, in place. */
static void scale_rows(const struct gqa_plan *plan, const struct gqa_operand *scales, const struct gqa_unit *unit,
                       int64_t first, int64_t count, int64_t width, char *rows) {
    struct gqa_run run;
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, scales, unit, first + done, count - done);
        for (int64_t i = 0; i < run.count; i++) {
            char *row = rows + (done + i) * width * (int64_t)plan->kernels->real_size;
            float scale;
            memcpy(&scale, run.at + i * scales->row, sizeof scale);
            plan->kernels->spread(row, 1, row, (int)width, (double)scale);
        }
    }
}

/* Run by run to scratch (count, width). */
static struct gqa_rows gather(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_unit *unit, int64_t first, int64_t count, int64_t width, char *scratch) {
    struct gqa_run run;
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, operand, unit, first + done, count - done);
        load_rows(plan->kernels, operand, run.at, run.count, width,
                  scratch + done * width * (int64_t)plan->kernels->real_size);
    }
    return (struct gqa_rows){scratch, (ptrdiff_t)width};
}

struct gqa_rows gqa_view_keys(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_operand *scales, const struct gqa_unit *unit, int64_t first,
                              int64_t count, int64_t width, void *scratch) {
    const struct gqa_run run = gqa_view_run(plan, operand, unit, first, count);
    if (run.count == count && !scales->data)
        return gqa_view_rows(plan->kernels, operand, run.at, 0, count, width, scratch);
    const struct gqa_rows rows = gather(plan, operand, unit, first, count, width, scratch);
    if (scales->data) scale_rows(plan, scales, unit, first, count, width, scratch);
    return rows;
}
