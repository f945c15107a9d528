/* view.c: the loader.  Type, stride, alignment, byte order, blocks and rings end here.
 * Called by tile.c, work.c, upcoming.c and merge.c. */
#include "view.h"

#include <string.h>

static bool lies_plainly(const struct gqa_operand *operand, const char *at) {
    return operand->plain && ((uintptr_t)at & (uintptr_t)(operand->size - 1)) == 0;
}

/* Bytes, a multiple of the element's size, in elements. */
static ptrdiff_t in_elements(const struct gqa_operand *operand, int64_t bytes) {
    return (ptrdiff_t)(bytes >> __builtin_ctzll((unsigned long long)operand->size));
}

static struct gqa_rows in_place(const struct gqa_operand *operand, const char *at) {
    return (struct gqa_rows){at, in_elements(operand, operand->row), operand->dtype};
}

/* To scratch (count, width), as reals. */
static struct gqa_rows loaded(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t count, void *scratch) {
    const int64_t width = operand->width;
    const bool joined = operand->row == width * operand->column; /* each row follows the last: as one long row */
    const int64_t rows = joined ? 1 : count, length = joined ? count * width : width;
    for (int64_t i = 0; i < rows; i++)
        kernels->load((char *)scratch + i * width * (int64_t)kernels->real_size, at + i * operand->row, operand->column,
                      operand->dtype, operand->swapped, (int)length);
    return (struct gqa_rows){scratch, (ptrdiff_t)width, gqa_own_dtype(kernels)};
}

struct gqa_rows gqa_stream_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                                int64_t count, void *scratch) {
    if (gqa_streams(kernels, operand->dtype) && lies_plainly(operand, at)) return in_place(operand, at);
    return loaded(kernels, operand, at, count, scratch);
}

struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t count, void *scratch) {
    const bool real = operand->dtype == gqa_own_dtype(kernels);
    return (real ? gqa_stream_rows : loaded)(kernels, operand, at, count, scratch);
}

char *gqa_even_rows(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_operand *operand,
                    int64_t row, ptrdiff_t *stride) {
    const int64_t step = plan->group == 1 ? operand->row : operand->head;
    const bool even = step % operand->size == 0 && (plan->group == 1 || step * plan->group == operand->row);
    char *at = gqa_operand_at(plan, operand, unit->sequence, unit->kv_head * plan->group) + row * step;
    *stride = in_elements(operand, step);
    return even && operand->dtype == gqa_own_dtype(plan->kernels) && lies_plainly(operand, at) ? at : NULL;
}

/* ---- keys of a sequence, which may be those of a cache ---- */

/* Blocks that follow each other in memory are one run. */
static struct gqa_run blocks_run(const struct gqa_plan *plan, const struct gqa_operand *operand,
                                 const struct gqa_unit *unit, int64_t first, int64_t count) {
    const int64_t rows = plan->run_rows, row = first % rows, step = plan->block_table.column;
    const char *entry = unit->blocks + first / rows * step;
    int64_t block, next;
    memcpy(&block, entry, sizeof block);
    const char *at = operand->data + unit->kv_head * operand->head + block * operand->block + row * operand->row;
    struct gqa_run run = {at, rows - row};
    if (operand->block == rows * operand->row)
        for (; run.count < count; run.count += rows, block = next) {
            memcpy(&next, entry += step, sizeof next);
            if (next != block + 1) break;
        }
    run.count = gqa_min(run.count, count);
    return run;
}

struct gqa_run gqa_view_run(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                            int64_t first, int64_t count) {
    if (unit->blocks) return blocks_run(plan, operand, unit, first, count);
    const int64_t row = first % plan->run_rows;
    const char *at = gqa_operand_at(plan, operand, unit->sequence, unit->kv_head) + row * operand->row;
    return (struct gqa_run){at, gqa_min(count, plan->run_rows - row)};
}

/* Run by run to scratch (count, width). */
static struct gqa_rows gather(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_unit *unit, int64_t first, int64_t count, char *scratch) {
    const int64_t row_bytes = operand->width * (int64_t)plan->kernels->real_size;
    struct gqa_run run;
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, operand, unit, first + done, count - done);
        loaded(plan->kernels, operand, run.at, run.count, scratch + done * row_bytes);
    }
    return (struct gqa_rows){scratch, (ptrdiff_t)operand->width, gqa_own_dtype(plan->kernels)};
}

/* From the row of key `first`, which lies at `at`, to the one that is read operand->ahead rows later in another run. */
static ptrdiff_t distance_ahead(const struct gqa_plan *plan, const struct gqa_unit *unit,
                                const struct gqa_stream *stream, int64_t first, const char *at) {
    const struct gqa_operand *operand = stream->operand;
    int64_t later = first + operand->ahead;
    if (later >= stream->end) {
        later += stream->then_first - stream->end;
        if (!stream->then || stream->then->row != operand->row || later >= unit->seq_k) return 0;
        operand = stream->then;
    }
    return (ptrdiff_t)((uintptr_t)gqa_view_run(plan, operand, unit, later, 1).at - (uintptr_t)at);
}

/* Pieces end with a run, or at a multiple of GQA_FEW_PIECE, so that sums have the same bits wherever keys lie, and
 * where the rows ahead go on elsewhere. */
struct gqa_piece gqa_stream_keys(const struct gqa_plan *plan, const struct gqa_unit *unit,
                                 const struct gqa_stream *stream, int64_t first, int64_t end, void *scratch) {
    const struct gqa_operand *operand = stream->operand;
    const int64_t ahead = operand->ahead;
    const struct gqa_run run = gqa_view_run(plan, operand, unit, first, gqa_min(end + ahead, stream->end) - first);
    const int64_t beside = run.count - ahead; /* rows whose row ahead lies in this run */
    int64_t count = gqa_min(end - first, run.count);
    if (count < end - first) count -= count % GQA_FEW_PIECE;
    if (count == 0) {
        count = gqa_min(end - first, GQA_FEW_PIECE);
        return (struct gqa_piece){gather(plan, operand, unit, first, count, scratch), first + count, 0};
    }
    if (beside >= GQA_FEW_PIECE) count = gqa_min(count, beside - beside % GQA_FEW_PIECE);
    struct gqa_piece piece = {gqa_stream_rows(plan->kernels, operand, run.at, count, scratch), first + count, 0};
    if (piece.rows.data == run.at)
        piece.ahead = beside >= GQA_FEW_PIECE ? (ptrdiff_t)(ahead * operand->row)
                                              : distance_ahead(plan, unit, stream, first, run.at);
    return piece;
}

struct gqa_rows gqa_narrow_rows(const struct gqa_plan *plan, struct gqa_rows rows, int64_t count, int64_t width,
                                void *scratch) {
    if (rows.dtype == GQA_BFLOAT16) return rows;
    plan->kernels->store(scratch, 2, GQA_BFLOAT16, false, scratch, (int)(count * width)); /* writes behind reads */
    return (struct gqa_rows){scratch, (ptrdiff_t)width, GQA_BFLOAT16};
}

void gqa_view_scales(const struct gqa_plan *plan, const struct gqa_operand *scales, const struct gqa_unit *unit,
                     int64_t first, int64_t count, float *to) {
    struct gqa_run run;
    for (int64_t done = 0; done < count; done += run.count) {
        run = gqa_view_run(plan, scales, unit, first + done, count - done);
        if (scales->row == sizeof *to)
            memcpy(&to[done], run.at, (size_t)run.count * sizeof *to);
        else
            for (int64_t i = 0; i < run.count; i++) memcpy(&to[done + i], run.at + i * scales->row, sizeof *to);
    }
}

struct gqa_rows gqa_view_keys(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_operand *scales, const struct gqa_unit *unit, int64_t first,
                              int64_t count, void *scratch) {
    const struct gqa_run run = gqa_view_run(plan, operand, unit, first, count);
    const int64_t width = operand->width;
    float scale[GQA_KEY_TILE];
    if (run.count == count && !scales->data) return gqa_view_rows(plan->kernels, operand, run.at, count, scratch);
    const struct gqa_rows rows = gather(plan, operand, unit, first, count, scratch);
    if (!scales->data) return rows;
    gqa_view_scales(plan, scales, unit, first, count, scale);
    for (int64_t i = 0; i < count; i++) {
        float *row = (float *)scratch + i * width; /* int8 goes with floats only */
        plan->kernels->multiply(row, row, (int)width, (double)scale[i]);
    }
    return rows;
}
