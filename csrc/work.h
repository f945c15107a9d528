/* work.h: a thread's workspace, and how a unit begins.  Used by attention.c, tile.c, bias.c, weigh.c and merge.c. */
#ifndef GQA_WORK_H
#define GQA_WORK_H

#include "plan.h"

/* Scratch of one thread.  Every buffer begins at a multiple of 64 bytes and holds reals unless it says otherwise. */
struct gqa_work {
    char *query;             /* unit_tiles x (width, row_tile), or (rows, width) when few, width = gqa_row_reals: scaled
                               * reals, or bfloat16 as it came, by pairs */
    char *scores;            /* (GQA_KEY_TILE, row_tile), or one (rows, GQA_KEY_TILE) for each tile of a span */
    char *bias;              /* one tile's shape */
    char *key, *value;       /* (GQA_KEY_TILE, head_dim), (.., v_dim): loaded rows */
    char *pairs;             /* (GQA_KEY_TILE, gqa_row_reals pairs): keys for outer_pairs that wants them whole */
    char *turned;            /* (v_dim, GQA_TURNED) bfloat16, v_dim padded: values for weigh_pairs */
    char *row;               /* one row of anything */
    char *rows;              /* (lanes, head_dim, v_dim or GQA_KEY_TILE, padded): rows to be turned, or that were */
    char *lo, *hi, *alpha;   /* (stats,) */
    char *final_m, *final_l; /* (stats,) copies, when weights are wanted */
    char *slope, *row_at;    /* (stats,) with ALiBi: slopes, and positions relative to the first row's */
    char *key_at;            /* (GQA_KEY_TILE,) the same of keys */
    char *ones;              /* (stats,), all 1 */
    int64_t *row_lo, *row_hi; /* (unit_tiles * tile_rows,) live keys of each row of the unit */
    char **parts;             /* levels buffers of part_bytes; see merge.h */
    int levels;
};

/* Lays a workspace out over `scratch`; with NULL only measures.  Returns the bytes it takes. */
size_t gqa_work_lay(const struct gqa_plan *plan, struct gqa_work *work, char *scratch);

/* Reals that a packed row of queries takes, padded; pairs of bfloat16 are as long as a float. */
static inline int64_t gqa_row_reals(const struct gqa_plan *plan, const struct gqa_form *form) {
    return gqa_round_up(form->paired ? plan->head_dim / 2 : plan->head_dim, plan->kernels->lanes);
}

/* Packs the unit's queries and finds its rows' bounds, and with them the unit's lo and hi. */
void gqa_unit_begin(const struct gqa_plan *plan, struct gqa_unit *unit, struct gqa_work *work);

/* Where the queries of a row tile lie. */
char *gqa_query_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_work *work,
                     int64_t tile);

#endif
