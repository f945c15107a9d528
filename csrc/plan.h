/* plan.h: one attention call, checked and cut into units of work.
 *
 * Made by plan.c from the problem; read by all that an attention call goes through.
 * Sizes count elements, strides count bytes unless they say reals. */
#ifndef GQA_PLAN_H
#define GQA_PLAN_H

#include "kernels.h"
#include "numbers.h"

enum {
    GQA_SPAN = 2048,           /* keys whose part is made without a merge, and one stream: a multiple of the key tile */
    GQA_TILES_PER_UNIT = 8,    /* row tiles that share each loaded K/V tile, at most */
    GQA_UNITS_PER_THREAD = 16, /* enough for an even load when units differ */
    GQA_CHUNKS_PER_THREAD = 64, /* of few rows: a thread that ends early waits for at most one of them */
};

/* An array seen as (leading dims..., head, row, column); a broadcast dimension has stride 0. */
struct gqa_operand {
    char *data; /* NULL: absent */
    enum gqa_dtype dtype;
    bool swapped;
    int64_t lead[GQA_MAX_DIMS];
    int64_t head, row, column;
    int64_t width, size;   /* elements of a row, bytes of an element */
    bool plain;            /* a row's elements follow each other as kernels read them, if the first lies at a multiple
                            * of its size */
    int64_t ahead;         /* rows: whole pieces, as many as take GQA_FETCH_AHEAD bytes, or one */
    int64_t block;         /* paged: from one block to the next */
    const int64_t *starts; /* packed: sequence b's rows begin at starts[b]; else NULL */
};

/* How rows are laid out: few at a time, or in lanes.  Rows of a kv head are its group's heads within
 * each query: row = i * group + head in group. */
struct gqa_form {
    bool few;
    bool paired;                /* bfloat16 queries and keys are multiplied as they are: see outer_pairs in kernels.h */
    bool turned;                /* and values: see weigh_pairs */
    bool aligned;               /* keys begin with a tile's first: how sums group them must not depend on the rows */
    int64_t tile_rows;          /* rows of a full tile */
    int o_rows, o_lanes, stats; /* a tile's output is (o_rows, o_lanes) reals, densely; its statistics stats each */
    size_t tile_bytes;          /* one row tile's o, m and l */
};

struct gqa_plan {
    const struct gqa_kernels *kernels;
    struct gqa_operand query, key, value, mask, out, lse, weights;
    struct gqa_operand slopes, sinks;                  /* columns are heads */
    struct gqa_operand query_lengths, kv_lengths;      /* int64, neither head, row nor column */
    struct gqa_operand query_positions, key_positions; /* int64, columns are positions */
    struct gqa_operand block_table;                    /* int64, columns are blocks */
    struct gqa_operand key_scales, value_scales;       /* float32, rows are keys; of int8 */
    int64_t run_rows; /* rows after which a cache goes on elsewhere, in the next block or from slot 0 */

    int lead_ndim;
    int64_t lead_shape[GQA_MAX_DIMS];
    int64_t sequences; /* product of lead_shape */
    int64_t q_heads, kv_heads, group;
    int64_t seq_q, seq_k, head_dim, v_dim;
    double scale, softcap;
    bool lower_right;
    int64_t left, right; /* the window around p_i, causal taken in; GQA_FAR where open */
    double dropout_p;
    uint64_t seed;
    bool biased; /* the bias tile is in use: a mask, slopes or key positions */

    struct gqa_form lanes, few;
    const struct gqa_form *form; /* of a sequence without padding: what the cut counts with */
    int64_t rows, tiles;         /* a kv head's rows, and the row tiles they fill */
    int64_t unit_tiles;          /* row tiles of a full unit */
    int64_t head_units;          /* units of a kv head */
    int64_t units;               /* of the whole call */
    int threads;                 /* that may take them */
    int64_t chunks;              /* tasks that a unit's spans are cut into */
    int chunk_level;             /* a chunk is 2^level spans, at an absolute multiple */
    size_t part_bytes;           /* a full unit's tiles */
};

/* An open side of the window. */
static const int64_t GQA_FAR = INT64_MAX;

/* What one task of a unit works on. */
struct gqa_unit {
    int64_t sequence, kv_head;
    int64_t first_row;
    int64_t rows, padding; /* rows of the sequence from first_row on, and rows past its end */
    const struct gqa_form *form;
    int64_t seq_k, offset; /* the sequence's keys; position of query i is i + offset, of key j it is j */
    const char *blocks;    /* its row of the block table, or NULL */
    int64_t lo, hi;        /* keys that the task reads: at first, those that are live for any row */
    int64_t after;         /* the unit that this thread is likely to take next; plan.units: none */
};

enum gqa_status gqa_plan_make(struct gqa_plan *plan, const struct gqa_attention *problem, int threads);
struct gqa_unit gqa_plan_unit(const struct gqa_plan *plan, int64_t index);

/* The position of query i, and of key j (negative: absent). */
int64_t gqa_query_position(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t i);
int64_t gqa_key_position(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t j);

/* Keys lo <= j < hi are live for query i as far as bounds go; lo == hi when none is. */
void gqa_plan_bounds(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t i, int64_t *lo, int64_t *hi);

/* Where (sequence, head) of an operand begins. */
char *gqa_operand_at(const struct gqa_plan *plan, const struct gqa_operand *operand, int64_t sequence, int64_t head);

#endif
