/* check.h: an attention problem against the contract of gqa.h.  Used by plan.c, attention.c and cache.c. */
#ifndef GQA_CHECK_H
#define GQA_CHECK_H

#include "gqa.h"

/* Dimension `back` counted from the last (1), or 1 where the array has fewer. */
static inline int64_t gqa_dim(const struct gqa_array *array, int back) {
    return back <= array->ndim ? array->shape[array->ndim - back] : 1;
}

/* Keys of a sequence as masks and positions count them. */
int64_t gqa_seq_k(const struct gqa_attention *problem);

/* Element i of an int64 array (n,), or (i, j) of one (n, m). */
int64_t gqa_integer(const struct gqa_array *array, int64_t i, int64_t j);

/* The entries of an int64 (B, blocks) table that keys first to end of sequence b lie in are in 0..blocks - 1. */
bool gqa_blocks_fit(const struct gqa_array *table, int64_t b, int64_t first, int64_t end, int64_t rows, int64_t blocks);

/* Whether out and lse have the types and the shape that gqa_attention_shape gave. */
bool gqa_outputs_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape);

#endif
