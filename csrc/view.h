/* view.h: rows of the caller's arrays as kernels want them, and results back.
 * Used by tile.c and merge.c. */
#ifndef GQA_VIEW_H
#define GQA_VIEW_H

#include "plan.h"

struct gqa_rows {
    const char *data;
    ptrdiff_t stride; /* elements */
    enum gqa_dtype dtype;
};

/* Rows `first` to `first + count` of the matrix at `at`: in place when its reals lie one after
 * another, otherwise loaded to scratch (count, width). */
struct gqa_rows gqa_view_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                              int64_t first, int64_t count, int64_t width, void *scratch);

/* The same for few rows: in place also where a kernel widens them as it reads. */
struct gqa_rows gqa_stream_rows(const struct gqa_kernels *kernels, const struct gqa_operand *operand, const char *at,
                                int64_t first, int64_t count, int64_t width, void *scratch);

#endif
