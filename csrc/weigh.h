/* weigh.h: what happens to finished weights: dropout, and storing them.  Used by tile.c. */
#ifndef GQA_WEIGH_H
#define GQA_WEIGH_H

#include "work.h"

/* Where a tile of weights stands in the problem, and how it lies: element (row, key) at
 * row * row_stride + key * key_stride reals. */
struct gqa_slots {
    int64_t first_row, first_key; /* of the kv head, of the sequence */
    int rows, keys;
    ptrdiff_t row_stride, key_stride;
};

/* Drops each weight with probability dropout_p and divides the others by 1 - dropout_p: a function
 * of (seed, sequence, head, query, key) only, so the same slots in every type and for any cut. */
void gqa_drop_out(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_slots *slots,
                  void *weights);

void gqa_weights_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                       const struct gqa_slots *slots, const char *weights);

#endif
