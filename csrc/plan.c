/* plan.c: checks an attention problem against the contract, and cuts it into units.
 *
 * Everything irregular about shapes ends here: after gqa_plan_make an operand has
 * one stride per meaning, and a unit is a range of rows of one kv head.  The cut
 * never changes a result: rows are independent, and spans of keys lie at absolute
 * multiples.  Called by attention.c; gqa_attention_shape also by module.c. */
#include "plan.h"

#include <math.h>

#include "dispatch.h"

/* ---- the check ---- */

/* Dimension `back` counted from the last (1), or 1 where the array has fewer. */
static int64_t dim(const struct gqa_array *array, int back) {
    return back <= array->ndim ? array->shape[array->ndim - back] : 1;
}

static int64_t step(const struct gqa_array *array, int back) {
    return back <= array->ndim && dim(array, back) != 1 ? array->strides[array->ndim - back] : 0;
}

static bool is_real(enum gqa_dtype dtype) { return dtype == GQA_FLOAT32 || dtype == GQA_FLOAT64; }

static bool types_fit(const struct gqa_attention *problem) {
    const enum gqa_dtype dtype = problem->query.dtype;
    return is_real(dtype) && problem->key.dtype == dtype && problem->value.dtype == dtype;
}

static bool heads_fit(const struct gqa_attention *problem) {
    const int64_t q_heads = dim(&problem->query, 3), kv_heads = dim(&problem->key, 3);
    if (kv_heads != dim(&problem->value, 3)) return false;
    if (kv_heads == 0 || !problem->grouped) return q_heads == kv_heads;
    return q_heads % kv_heads == 0;
}

static bool matrices_fit(const struct gqa_attention *problem) {
    const struct gqa_array *query = &problem->query, *key = &problem->key, *value = &problem->value;
    if (query->ndim < 2 || key->ndim < 2 || value->ndim < 2) return false;
    return dim(query, 1) == dim(key, 1) && dim(query, 1) > 0 && dim(key, 2) == dim(value, 2);
}

/* Widens *size to take in one more operand's size, as NumPy broadcasts. */
static bool broadcast(int64_t *size, int64_t other) {
    if (*size == 1) *size = other;
    return other == 1 || other == *size;
}

static bool mask_fits(const struct gqa_array *mask, int ndim, const int64_t *shape, int64_t seq_k) {
    if (!mask->data) return true;
    if (mask->ndim > ndim) return false;
    for (int back = 1; back <= mask->ndim; back++) {
        const int64_t size = dim(mask, back), want = back == 1 ? seq_k : shape[ndim - back];
        if (size != 1 && size != want) return false;
    }
    return true;
}

static int larger(int a, int b) { return a > b ? a : b; }

enum gqa_status gqa_attention_shape(const struct gqa_attention *problem, int *ndim, int64_t shape[GQA_MAX_DIMS]) {
    const struct gqa_array *query = &problem->query, *key = &problem->key, *value = &problem->value;
    if (!types_fit(problem) || !matrices_fit(problem) || !heads_fit(problem)) return GQA_BAD_ARGUMENT;
    if (problem->has_scale && !isfinite(problem->scale)) return GQA_BAD_ARGUMENT;
    *ndim = larger(query->ndim, larger(key->ndim, value->ndim));
    for (int back = *ndim; back > 3; back--) {
        int64_t *size = &shape[*ndim - back];
        *size = dim(query, back);
        if (!broadcast(size, dim(key, back)) || !broadcast(size, dim(value, back))) return GQA_BAD_ARGUMENT;
    }
    if (*ndim >= 3) shape[*ndim - 3] = dim(query, 3);
    shape[*ndim - 2] = dim(query, 2);
    shape[*ndim - 1] = dim(value, 1);
    return mask_fits(&problem->mask, *ndim, shape, dim(key, 2)) ? GQA_OK : GQA_BAD_ARGUMENT;
}

static bool same_shape(const struct gqa_array *array, int ndim, const int64_t *shape) {
    if (array->ndim != ndim) return false;
    for (int i = 0; i < ndim; i++)
        if (array->shape[i] != shape[i]) return false;
    return true;
}

static bool outputs_fit(const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    if (problem->out.dtype != problem->query.dtype || !same_shape(&problem->out, ndim, shape)) return false;
    if (!problem->lse.data) return true;
    return problem->lse.dtype == problem->query.dtype && same_shape(&problem->lse, ndim - 1, shape);
}

/* ---- the operands ---- */

/* trailing: dimensions after the head, 2, or 1 for the lse, which has no columns. */
static void see(struct gqa_operand *operand, const struct gqa_array *array, int lead_ndim, int trailing) {
    operand->data = array->data;
    operand->dtype = array->dtype;
    operand->swapped = array->swapped;
    operand->column = trailing == 2 ? step(array, 1) : 0;
    operand->row = step(array, trailing);
    operand->head = step(array, trailing + 1);
    for (int i = 0; i < lead_ndim; i++) operand->lead[i] = step(array, trailing + 1 + lead_ndim - i);
}

static void see_all(struct gqa_plan *plan, const struct gqa_attention *problem) {
    see(&plan->query, &problem->query, plan->lead_ndim, 2);
    see(&plan->key, &problem->key, plan->lead_ndim, 2);
    see(&plan->value, &problem->value, plan->lead_ndim, 2);
    see(&plan->out, &problem->out, plan->lead_ndim, 2);
    plan->mask.data = plan->lse.data = NULL;
    if (problem->mask.data) see(&plan->mask, &problem->mask, plan->lead_ndim, 2);
    if (problem->lse.data) see(&plan->lse, &problem->lse, plan->lead_ndim, 1);
}

char *gqa_operand_at(const struct gqa_plan *plan, const struct gqa_operand *operand, int64_t sequence, int64_t head) {
    char *at = operand->data + head * operand->head;
    for (int i = plan->lead_ndim - 1; i >= 0; i--) {
        at += sequence % plan->lead_shape[i] * operand->lead[i];
        sequence /= plan->lead_shape[i];
    }
    return at;
}

static void measure(struct gqa_plan *plan, const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    plan->lead_ndim = ndim > 3 ? ndim - 3 : 0;
    plan->sequences = 1;
    for (int i = 0; i < plan->lead_ndim; i++) plan->sequences *= plan->lead_shape[i] = shape[i];
    plan->q_heads = dim(&problem->query, 3);
    plan->kv_heads = dim(&problem->key, 3);
    plan->group = plan->kv_heads ? plan->q_heads / plan->kv_heads : 0;
    plan->seq_q = dim(&problem->query, 2);
    plan->seq_k = dim(&problem->key, 2);
    plan->head_dim = dim(&problem->query, 1);
    plan->v_dim = dim(&problem->value, 1);
    plan->scale = problem->has_scale ? problem->scale : 1 / sqrt((double)plan->head_dim);
    plan->causal = problem->causal;
    plan->offset = problem->alignment == GQA_LOWER_RIGHT ? plan->seq_k - plan->seq_q : 0;
}

void gqa_plan_bounds(const struct gqa_plan *plan, int64_t i, int64_t *lo, int64_t *hi) {
    *lo = 0;
    *hi = plan->causal ? gqa_max(0, gqa_min(plan->seq_k, i + plan->offset + 1)) : plan->seq_k;
}

/* ---- the cut ---- */

static void shape_tiles(struct gqa_plan *plan) {
    const struct gqa_kernels *kernels = plan->kernels;
    plan->rows = plan->seq_q * plan->group;
    plan->few = plan->rows <= kernels->few_rows;
    plan->tile_rows = plan->few ? gqa_max(plan->rows, 1) : kernels->row_tile;
    plan->tiles = gqa_ceil_div(plan->rows, plan->tile_rows);
    plan->o_rows = (int)(plan->few ? plan->tile_rows : plan->v_dim);
    plan->o_lanes = plan->few ? (int)gqa_round_up(plan->v_dim, kernels->lanes) : kernels->row_tile;
    plan->stats = (int)gqa_round_up(plan->tile_rows, kernels->lanes);
    const size_t reals = (size_t)plan->o_rows * (size_t)plan->o_lanes + 2 * (size_t)plan->stats;
    plan->tile_bytes = (size_t)gqa_round_up((int64_t)(reals * kernels->real_size), 64);
}

/* Aims at enough units for an even load; a unit with many row tiles reads K and V less often. */
static void cut(struct gqa_plan *plan, int threads) {
    const int64_t kv_heads = plan->sequences * plan->kv_heads;
    const int64_t wanted = threads > 1 ? (int64_t)threads * GQA_UNITS_PER_THREAD : 1;
    const int64_t fewest = gqa_ceil_div(plan->tiles, GQA_TILES_PER_UNIT);
    plan->head_units = kv_heads ? gqa_min(plan->tiles, gqa_max(fewest, gqa_ceil_div(wanted, kv_heads))) : 0;
    plan->unit_tiles = plan->head_units ? gqa_ceil_div(plan->tiles, plan->head_units) : 1;
    plan->head_units = gqa_ceil_div(plan->tiles, plan->unit_tiles);
    plan->units = kv_heads * plan->head_units;
    plan->part_bytes = (size_t)plan->unit_tiles * plan->tile_bytes;

    const int64_t spans = gqa_ceil_div(plan->seq_k, GQA_SPAN);
    const int64_t chunks = plan->units ? gqa_ceil_div(wanted, plan->units) : 1;
    for (plan->chunk_level = 0; gqa_ceil_div(spans, INT64_C(1) << plan->chunk_level) > chunks;) plan->chunk_level++;
    plan->chunks = gqa_max(1, gqa_ceil_div(spans, INT64_C(1) << plan->chunk_level));
}

enum gqa_status gqa_plan_make(struct gqa_plan *plan, const struct gqa_attention *problem, int threads) {
    int ndim;
    int64_t shape[GQA_MAX_DIMS];
    const enum gqa_status status = gqa_attention_shape(problem, &ndim, shape);
    if (status != GQA_OK) return status;
    if (!outputs_fit(problem, ndim, shape)) return GQA_BAD_ARGUMENT;
    plan->kernels = gqa_kernels_for(problem->query.dtype);
    measure(plan, problem, ndim, shape);
    see_all(plan, problem);
    shape_tiles(plan);
    cut(plan, threads);
    return GQA_OK;
}

/* Units of one kv head follow each other, so that threads share its keys in the last-level cache,
 * and its late rows come first: under causal they are the long ones. */
struct gqa_unit gqa_plan_unit(const struct gqa_plan *plan, int64_t index) {
    const int64_t head = index / plan->head_units, turn = plan->head_units - 1 - index % plan->head_units;
    const int64_t first_row = turn * plan->unit_tiles * plan->tile_rows;
    return (struct gqa_unit){
        .sequence = head / plan->kv_heads,
        .kv_head = head % plan->kv_heads,
        .first_row = first_row,
        .rows = gqa_min(plan->unit_tiles * plan->tile_rows, plan->rows - first_row),
    };
}
