/* bias.h: the bias tile: what is added to the scores of one row tile and one key tile, and
 * -inf where a slot is dropped.  Used by tile.c. */
#ifndef GQA_BIAS_H
#define GQA_BIAS_H

#include "work.h"

/* Fills work->bias for rows first_row.. of the unit's kv head and keys first_key..: the mask, then
 * ALiBi, then explicit key positions. */
void gqa_bias_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first_row,
                   int rows, int64_t first_key, int keys);

#endif
