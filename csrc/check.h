/* check.h: an attention problem against the contract of gqa.h.  Used by plan.c. */
#ifndef GQA_CHECK_H
#define GQA_CHECK_H

#include "gqa.h"

/* Dimension `back` counted from the last (1), or 1 where the array has fewer. */
static inline int64_t gqa_dim(const struct gqa_array *array, int back) {
    return back <= array->ndim ? array->shape[array->ndim - back] : 1;
}

/* Whether out and lse have the types and the shape that gqa_attention_shape gave. */
bool gqa_outputs_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape);

#endif
