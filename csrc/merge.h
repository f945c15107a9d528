/* merge.h: parts of disjoint keys into one, always in the same order.
 *
 * Spans are the leaves of a binary tree that stands on absolute multiples; a span
 * without live keys changes no bit.  So the result does not depend on who makes
 * which part, nor on keys appended later.  Used by attention.c. */
#ifndef GQA_MERGE_H
#define GQA_MERGE_H

#include "work.h"

/* A binary counter of parts: place i holds the part of 2^i spans, as a set bit does. */
struct gqa_fold {
    int first_level; /* of the parts that come in: a chunk is already a subtree */
    uint64_t held;   /* bit i: parts[i] is in use; parts[levels - 1] is the one being made */
};

/* Takes in parts[levels - 1], which covers leaf `index` (its number among leaves of its size). */
void gqa_fold_add(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                  struct gqa_fold *fold, int64_t index);

/* Joins what is left and returns the whole part; there must be one. */
char *gqa_fold_end(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                   struct gqa_fold *fold);

/* Takes in the sinks, divides by the sums and writes out and lse. */
void gqa_part_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part);

/* Rows past the end of the sequence: out 0, lse -inf. */
void gqa_padding_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work);

#endif
