/* mask.h: an attn_mask's share of the bias tile.  Used by tile.c. */
#ifndef GQA_MASK_H
#define GQA_MASK_H

#include "plan.h"

/* Writes what the mask adds to the scores of rows first_row.. and keys first_key..: bias element
 * (row, key) at row * row_stride + key * key_stride reals. */
void gqa_mask_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t first_row, int rows,
                   int64_t first_key, int keys, void *bias, ptrdiff_t row_stride, ptrdiff_t key_stride);

#endif
