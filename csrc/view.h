/* view.h: rows of the caller's arrays as kernels want them, and results back.
 * Used by tile.c and merge.c. */
#ifndef GQA_VIEW_H
#define GQA_VIEW_H

#include "plan.h"

struct gqa_rows {
    const char *data; /* reals */
    ptrdiff_t stride; /* reals */
};

/* Rows `first` to `first + count` of the matrix at `at`: in place when its reals lie one after
 * another, otherwise loaded to scratch (count, width). */
struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch);

/* Keys of one sequence and head that lie at one stride, the operand's. */
struct gqa_run {
    const char *at;
    int64_t count;
};

/* The run that begins with key `first` and holds at most `count` keys. */
struct gqa_run gqa_view_run(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                            int64_t first, int64_t count);

/* Where a few rows' next piece of keys ends: no further than a run, and at a multiple of GQA_PIECE, so that sums
 * have the same bits wherever the keys lie. */
int64_t gqa_piece_end(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                      int64_t first, int64_t end);

/* Keys `first` to `first + count`: in place where gqa_view_rows would and they lie in one run.  int8 rows are
 * multiplied by their scales. */
struct gqa_rows gqa_view_keys(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_operand *scales, const struct gqa_unit *unit, int64_t first,
                              int64_t count, int64_t width, void *scratch);

#endif
