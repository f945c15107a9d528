/* plan.c: cuts a checked attention problem into units.
 *
 * Everything irregular about shapes ends here: after gqa_plan_make an operand has
 * one stride per meaning, and a unit is a range of rows of one kv head.  The cut
 * never changes a result: rows are independent, spans of keys lie at absolute
 * multiples, and the form depends on the sequence's own rows.  Called by attention.c. */
#include "plan.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "dispatch.h"
#include "elements.h"

/* ---- the operands ---- */

static int64_t step(const struct gqa_array *array, int back) {
    return back <= array->ndim && gqa_dim(array, back) != 1 ? array->strides[array->ndim - back] : 0;
}

/* trailing: how many dimensions there are after the leading ones; they are the last of head, row, column. */
static void see(struct gqa_plan *plan, struct gqa_operand *operand, const struct gqa_array *array, int trailing) {
    operand->data = array->data;
    if (!array->data) return;
    operand->dtype = array->dtype;
    operand->swapped = array->swapped;
    operand->head = operand->row = operand->column = 0;
    operand->starts = NULL;
    for (int i = 0; i < plan->lead_ndim; i++) operand->lead[i] = step(array, trailing + plan->lead_ndim - i);
}

static void see_matrix(struct gqa_plan *plan, struct gqa_operand *operand, const struct gqa_array *array) {
    see(plan, operand, array, 3);
    if (!array->data) return;
    operand->head = step(array, 3);
    operand->row = step(array, 2);
    operand->column = step(array, 1);
    operand->width = gqa_dim(array, 1);
    operand->size = (int64_t)gqa_itemsize(array->dtype);
    const bool joined = operand->column == operand->size || operand->width <= 1;
    operand->plain = joined && !operand->swapped && operand->row % operand->size == 0;
    operand->ahead =
        gqa_round_up(gqa_ceil_div(GQA_FETCH_AHEAD, gqa_max(1, operand->width * operand->size)), GQA_FEW_PIECE);
}

static void see_vector(struct gqa_plan *plan, struct gqa_operand *operand, const struct gqa_array *array) {
    see(plan, operand, array, 1);
    if (array->data) operand->column = step(array, 1);
}

/* One number for each key, which lies as the keys do. */
static void see_scales(struct gqa_plan *plan, struct gqa_operand *operand, const struct gqa_array *array) {
    see(plan, operand, array, 2);
    if (!array->data) return;
    operand->head = step(array, 2);
    operand->row = step(array, 1);
}

/* Blocks have no leading dimension: the table says whose they are. */
static void see_blocks(struct gqa_plan *plan, struct gqa_operand *operand, const struct gqa_array *array, int back) {
    if (!array->data) return;
    memset(operand->lead, 0, (size_t)plan->lead_ndim * sizeof *operand->lead);
    operand->block = step(array, back);
}

static void see_cache(struct gqa_plan *plan, const struct gqa_attention *problem) {
    see_scales(plan, &plan->key_scales, &problem->key_scales);
    see_scales(plan, &plan->value_scales, &problem->value_scales);
    see_vector(plan, &plan->block_table, &problem->block_table);
    plan->run_rows = problem->cached ? gqa_max(1, gqa_dim(&problem->key, 2)) : INT64_MAX;
    if (!problem->block_table.data) return;
    see_blocks(plan, &plan->key, &problem->key, 4);
    see_blocks(plan, &plan->value, &problem->value, 4);
    see_blocks(plan, &plan->key_scales, &problem->key_scales, 3);
    see_blocks(plan, &plan->value_scales, &problem->value_scales, 3);
}

static void see_all(struct gqa_plan *plan, const struct gqa_attention *problem) {
    see_matrix(plan, &plan->query, &problem->query);
    see_matrix(plan, &plan->key, &problem->key);
    see_matrix(plan, &plan->value, &problem->value);
    see_matrix(plan, &plan->mask, &problem->mask);
    see_matrix(plan, &plan->out, &problem->out);
    see_matrix(plan, &plan->weights, &problem->weights);
    see(plan, &plan->lse, &problem->lse, 2);
    if (problem->lse.data) {
        plan->lse.head = step(&problem->lse, 2);
        plan->lse.row = step(&problem->lse, 1);
    }
    see_vector(plan, &plan->slopes, &problem->alibi_slopes);
    see_vector(plan, &plan->sinks, &problem->sinks);
    see_vector(plan, &plan->query_positions, &problem->query_positions);
    see_vector(plan, &plan->key_positions, &problem->key_positions);
    see(plan, &plan->query_lengths, &problem->query_lengths, 0);
    see(plan, &plan->kv_lengths, &problem->kv_lengths, 0);
    see_cache(plan, problem);
}

char *gqa_operand_at(const struct gqa_plan *plan, const struct gqa_operand *operand, int64_t sequence, int64_t head) {
    char *at = operand->data + head * operand->head;
    if (operand->starts) at += operand->starts[sequence] * operand->row;
    for (int i = plan->lead_ndim - 1; i >= 0; i--) {
        at += sequence % plan->lead_shape[i] * operand->lead[i];
        sequence /= plan->lead_shape[i];
    }
    return at;
}

static void measure(struct gqa_plan *plan, const struct gqa_attention *problem, int ndim, const int64_t *shape) {
    const bool packed = problem->cu_seqlens_q.data;
    plan->lead_ndim = packed ? 1 : ndim > 3 ? ndim - 3 : 0;
    plan->sequences = 1;
    for (int i = 0; i < plan->lead_ndim; i++)
        plan->sequences *= plan->lead_shape[i] = packed ? problem->cu_seqlens_q.shape[0] - 1 : shape[i];
    plan->q_heads = gqa_dim(&problem->query, 3);
    plan->kv_heads = gqa_dim(&problem->key, 3);
    plan->group = plan->kv_heads ? plan->q_heads / plan->kv_heads : 0;
    plan->seq_q = gqa_dim(&problem->query, 2);
    plan->seq_k = gqa_seq_k(problem);
    plan->head_dim = gqa_dim(&problem->query, 1);
    plan->v_dim = gqa_dim(&problem->value, 1);
}

/* The sequences of packed arrays are told apart by where they begin; slopes may still have a row for each. */
static void unpack(struct gqa_plan *plan, const struct gqa_attention *problem) {
    const int64_t *q = (const int64_t *)(const void *)problem->cu_seqlens_q.data;
    const int64_t *k = (const int64_t *)(const void *)problem->cu_seqlens_k.data;
    if (!q) return;
    plan->query.starts = plan->out.starts = plan->lse.starts = q;
    plan->key.starts = plan->value.starts = k;
    plan->seq_q = plan->seq_k = 0;
    for (int64_t b = 0; b < plan->sequences; b++) {
        plan->seq_q = gqa_max(plan->seq_q, q[b + 1] - q[b]);
        plan->seq_k = gqa_max(plan->seq_k, k[b + 1] - k[b]);
    }
}

/* The types and head_dim alone decide: the same bits however the arrays lie. */
static bool goes_by_pairs(const struct gqa_plan *plan) {
    return plan->query.dtype == GQA_BFLOAT16 && plan->key.dtype == GQA_BFLOAT16 && plan->head_dim % 2 == 0;
}

static void take_rules(struct gqa_plan *plan, const struct gqa_attention *problem) {
    plan->scale = problem->has_scale ? problem->scale : 1 / sqrt((double)plan->head_dim);
    plan->softcap = problem->softcap;
    plan->dropout_p = problem->dropout_p;
    plan->seed = problem->seed;
    plan->lower_right = problem->alignment == GQA_LOWER_RIGHT;
    plan->left = problem->left == GQA_OPEN ? GQA_FAR : problem->left;
    plan->right = problem->right == GQA_OPEN ? GQA_FAR : problem->right;
    if (problem->causal) plan->right = 0;
    plan->biased = plan->mask.data || plan->slopes.data || plan->key_positions.data;
}

/* ---- positions and bounds ---- */

static int64_t integer_at(const char *at) {
    int64_t x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* Rows of a sequence: of a packed operand, by its lengths, or all. */
static int64_t length_of(const struct gqa_plan *plan, const struct gqa_operand *operand,
                         const struct gqa_operand *lengths, int64_t sequence, int64_t all) {
    if (operand->starts) return operand->starts[sequence + 1] - operand->starts[sequence];
    return lengths->data ? integer_at(gqa_operand_at(plan, lengths, sequence, 0)) : all;
}

int64_t gqa_query_position(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t i) {
    if (!plan->query_positions.data) return i + unit->offset;
    const char *at = gqa_operand_at(plan, &plan->query_positions, unit->sequence, 0);
    return integer_at(at + i * plan->query_positions.column);
}

int64_t gqa_key_position(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t j) {
    if (!plan->key_positions.data) return j;
    const char *at = gqa_operand_at(plan, &plan->key_positions, unit->sequence, 0);
    return integer_at(at + j * plan->key_positions.column);
}

void gqa_plan_bounds(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t i, int64_t *lo, int64_t *hi) {
    int64_t oldest;
    *lo = oldest = plan->block_table.data ? 0 : gqa_max(0, unit->seq_k - plan->run_rows);
    *hi = unit->seq_k;
    if (plan->key_positions.data) return; /* in any order: the bias tile says who is live */
    const int64_t position = gqa_query_position(plan, unit, i);
    *lo = gqa_max(oldest, gqa_min(*hi, gqa_less(position, plan->left)));
    if (plan->right != GQA_FAR) *hi = gqa_max(*lo, gqa_min(*hi, gqa_less(position, -plan->right - 1)));
}

/* ---- the cut ---- */

static struct gqa_form shape_tile(const struct gqa_plan *plan, bool few) {
    const struct gqa_kernels *kernels = plan->kernels;
    struct gqa_form form = {.few = few, .tile_rows = kernels->row_tile};
    form.paired = goes_by_pairs(plan) && (few ? kernels->dot_pairs != NULL : kernels->outer_pairs != NULL);
    form.turned = form.paired && !few && kernels->weigh_pairs && plan->value.dtype == GQA_BFLOAT16;
    form.aligned = few || form.turned;
    if (few) form.tile_rows = gqa_max(1, gqa_min(plan->rows, kernels->few_rows));
    form.o_rows = (int)(few ? form.tile_rows : gqa_round_up(plan->v_dim, kernels->lanes)); /* to be turned */
    form.o_lanes = few ? (int)gqa_round_up(plan->v_dim, kernels->lanes) : kernels->row_tile;
    form.stats = (int)gqa_round_up(form.tile_rows, kernels->lanes);
    const size_t reals = (size_t)form.o_rows * (size_t)form.o_lanes + 2 * (size_t)form.stats;
    form.tile_bytes = (size_t)gqa_round_up((int64_t)(reals * kernels->real_size), 64);
    return form;
}

static const struct gqa_form *form_for(const struct gqa_plan *plan, int64_t rows) {
    return rows <= plan->kernels->few_rows ? &plan->few : &plan->lanes;
}

static void shape_tiles(struct gqa_plan *plan) {
    plan->rows = plan->seq_q * plan->group;
    plan->lanes = shape_tile(plan, false);
    plan->few = shape_tile(plan, true);
    plan->form = form_for(plan, plan->rows);
    plan->tiles = gqa_ceil_div(plan->rows, plan->form->tile_rows);
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
    plan->threads = threads;
    plan->part_bytes = (size_t)plan->unit_tiles * plan->form->tile_bytes;
    if (plan->part_bytes < plan->few.tile_bytes) plan->part_bytes = plan->few.tile_bytes;

    const int64_t spans = gqa_ceil_div(plan->seq_k, GQA_SPAN);
    const int64_t tasks = threads > 1 && plan->form->few ? (int64_t)threads * GQA_CHUNKS_PER_THREAD : wanted;
    const int64_t chunks = plan->units ? gqa_ceil_div(tasks, plan->units) : 1;
    for (plan->chunk_level = 0; gqa_ceil_div(spans, INT64_C(1) << plan->chunk_level) > chunks;) plan->chunk_level++;
    plan->chunks = gqa_max(1, gqa_ceil_div(spans, INT64_C(1) << plan->chunk_level));
}

enum gqa_status gqa_plan_make(struct gqa_plan *plan, const struct gqa_attention *problem, int threads) {
    int ndim;
    int64_t shape[GQA_MAX_DIMS];
    const enum gqa_status status = gqa_attention_shape(problem, &ndim, shape);
    if (status != GQA_OK) return status;
    if (!gqa_outputs_fit(problem, ndim, shape)) return GQA_BAD_ARGUMENT;
    plan->kernels = gqa_kernels_for(problem->query.dtype);
    measure(plan, problem, ndim, shape);
    see_all(plan, problem);
    unpack(plan, problem);
    take_rules(plan, problem);
    shape_tiles(plan);
    cut(plan, threads);
    return GQA_OK;
}

/* Units of one kv head follow each other, so that threads share its keys in the last-level cache,
 * and its late rows come first: under causal they are the long ones. */
struct gqa_unit gqa_plan_unit(const struct gqa_plan *plan, int64_t index) {
    const int64_t head = index / plan->head_units, turn = plan->head_units - 1 - index % plan->head_units;
    const int64_t most = plan->unit_tiles * plan->form->tile_rows;
    struct gqa_unit unit = {.sequence = head / plan->kv_heads, .kv_head = head % plan->kv_heads};
    unit.after = gqa_min(index + plan->threads, plan->units);
    const int64_t seq_q = length_of(plan, &plan->query, &plan->query_lengths, unit.sequence, plan->seq_q);
    const int64_t live = seq_q * plan->group;
    unit.first_row = turn * most;
    unit.rows = gqa_max(0, gqa_min(most, live - unit.first_row));
    /* past the end of a packed sequence the next one begins */
    unit.padding = plan->query.starts ? 0 : gqa_min(most, plan->rows - unit.first_row) - unit.rows;
    unit.form = form_for(plan, live);
    unit.seq_k = length_of(plan, &plan->key, &plan->kv_lengths, unit.sequence, plan->seq_k);
    unit.offset = plan->lower_right ? unit.seq_k - seq_q : 0;
    if (plan->block_table.data) unit.blocks = gqa_operand_at(plan, &plan->block_table, unit.sequence, 0);
    return unit;
}
