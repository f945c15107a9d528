/* tile.h: the walk of one unit over its keys.
 * Used by attention.c; parts of units are joined by merge.c. */
#ifndef GQA_TILE_H
#define GQA_TILE_H

#include "pool.h"
#include "work.h"

/* The part of keys first <= j < end (within one span): outputs not yet divided, maxima and sums. */
void gqa_unit_span(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                   int64_t first, int64_t end, struct gqa_job *job);

/* Writes the weights of the unit's keys, from a part whose maxima and sums are final. */
void gqa_unit_weights(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                      struct gqa_job *job);

#endif
