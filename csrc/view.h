/* view.h: rows of the caller's arrays as kernels want them, and results back.
 * Used by tile.c, work.c, upcoming.c and merge.c. */
#ifndef GQA_VIEW_H
#define GQA_VIEW_H

#include "plan.h"

struct gqa_rows {
    const char *data;
    ptrdiff_t stride; /* elements */
    enum gqa_dtype dtype;
};

/* The `count` rows from `at` on: in place when a row's reals lie one after another, otherwise loaded to
 * scratch (count, width). */
struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t count, void *scratch);

/* The same, in place also where kernels widen a row as they read it: see gqa_streams. */
struct gqa_rows gqa_stream_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                                int64_t count, void *scratch);

/* Where a row of the unit's kv head lies, if it and those after it are reals at one stride, which goes to *stride;
 * else NULL. */
char *gqa_even_rows(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_operand *operand,
                    int64_t row, ptrdiff_t *stride);

/* Keys of one sequence and head that lie at one stride, the operand's. */
struct gqa_run {
    const char *at;
    int64_t count;
};

/* The run that begins with key `first`, and `count` keys of it at most. */
struct gqa_run gqa_view_run(const struct gqa_plan *plan, const struct gqa_operand *operand, const struct gqa_unit *unit,
                            int64_t first, int64_t count);

/* Keys `first` to `first + count`, at most a tile: in place where gqa_view_rows would and they lie in one run.  int8
 * rows are multiplied by their scales. */
struct gqa_rows gqa_view_keys(const struct gqa_plan *plan, const struct gqa_operand *operand,
                              const struct gqa_operand *scales, const struct gqa_unit *unit, int64_t first,
                              int64_t count, void *scratch);

/* The keys that few rows read one after another, and what they read after the last. */
struct gqa_stream {
    const struct gqa_operand *operand;
    int64_t end;
    const struct gqa_operand *then; /* from key then_first on; or NULL */
    int64_t then_first;
};

/* Keys that few rows take at once. */
struct gqa_piece {
    struct gqa_rows rows;
    int64_t end;     /* the key that comes next */
    ptrdiff_t ahead; /* see dot in kernels.h */
};

/* The piece of a stream that begins with key `first` and ends at `end` or before, at most a tile: in place also where
 * a kernel widens rows as it reads; int8 is left as it is. */
struct gqa_piece gqa_stream_keys(const struct gqa_plan *plan, const struct gqa_unit *unit,
                                 const struct gqa_stream *stream, int64_t first, int64_t end, void *scratch);

/* Rows of bfloat16, whatever lies there: rows that were loaded to scratch become bfloat16 again, there. */
struct gqa_rows gqa_narrow_rows(const struct gqa_plan *plan, struct gqa_rows rows, int64_t count, int64_t width,
                                void *scratch);

/* The scales of int8 keys `first` to `first + count`. */
void gqa_view_scales(const struct gqa_plan *plan, const struct gqa_operand *scales, const struct gqa_unit *unit,
                     int64_t first, int64_t count, float *to);

#endif
