/* upcoming.h: what many rows will read next, so that products can bring it nearer: the rest of this key tile, the
 * next one, and where the unit ends, what the next unit begins with.  Used by tile.c. */
#ifndef GQA_UPCOMING_H
#define GQA_UPCOMING_H

#include "plan.h"

struct gqa_upcoming {
    struct gqa_fetch part[5]; /* in the order in which they are read */
    int count;
};

/* While keys first <= j < end are attended to.  loaded: their values have been read; else they are read in place. */
struct gqa_upcoming gqa_upcoming_after(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t first,
                                       int64_t end, bool loaded);

/* The first part that is not yet all asked for, or NULL. */
struct gqa_fetch *gqa_upcoming_next(struct gqa_upcoming *upcoming);

#endif
