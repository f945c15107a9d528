/* work.c: the workspace of a thread, and what a unit begins with: its queries, packed as kernels want them, and the
 * keys that its rows may see.  Called by attention.c and tile.c. */
#include "work.h"

#include <string.h>

#include "view.h"

/* ---- workspace ---- */

static char *take(char **cursor, int64_t bytes) {
    char *taken = *cursor;
    *cursor += gqa_round_up(bytes, 64);
    return taken;
}

/* Parts that can be alive at once: one for each bit of the number of spans, and one being made. */
static int count_levels(const struct gqa_plan *plan) {
    int levels = 2;
    for (int64_t spans = gqa_ceil_div(plan->seq_k, GQA_SPAN); spans > 1; spans /= 2) levels++;
    return levels;
}

size_t gqa_work_lay(const struct gqa_plan *plan, struct gqa_work *work, char *scratch) {
    const int64_t real = (int64_t)plan->kernels->real_size, lanes = plan->kernels->lanes;
    const int64_t head_dim = gqa_round_up(plan->head_dim, lanes), v_dim = gqa_round_up(plan->v_dim, lanes);
    const int64_t tile_rows = gqa_round_up(plan->form->tile_rows, lanes), unit_rows = plan->unit_tiles * tile_rows;
    char *cursor = scratch;
    work->levels = count_levels(plan);
    work->query = take(&cursor, unit_rows * head_dim * real);
    work->scores = take(&cursor, gqa_max(GQA_KEY_TILE * tile_rows, GQA_SPAN * plan->few.tile_rows) * real);
    work->bias = take(&cursor, plan->biased ? GQA_KEY_TILE * tile_rows * real : 0);
    work->key = take(&cursor, GQA_KEY_TILE * plan->head_dim * real);
    work->value = take(&cursor, GQA_KEY_TILE * plan->v_dim * real);
    const bool whole = plan->lanes.paired && plan->kernels->whole_pairs;
    work->pairs = take(&cursor, whole ? GQA_KEY_TILE * gqa_row_reals(plan, &plan->lanes) * real : 0);
    work->turned = take(&cursor, plan->lanes.turned ? v_dim * GQA_TURNED * (int64_t)sizeof(uint16_t) : 0);
    work->row = take(&cursor, gqa_max(head_dim, v_dim) * real);
    work->rows = take(&cursor, lanes * gqa_max(GQA_KEY_TILE, gqa_max(head_dim, v_dim)) * real);
    work->lo = take(&cursor, tile_rows * real);
    work->hi = take(&cursor, tile_rows * real);
    work->alpha = take(&cursor, tile_rows * real);
    work->final_m = take(&cursor, plan->weights.data ? tile_rows * real : 0);
    work->final_l = take(&cursor, plan->weights.data ? tile_rows * real : 0);
    work->slope = take(&cursor, plan->slopes.data ? tile_rows * real : 0);
    work->row_at = take(&cursor, plan->slopes.data ? tile_rows * real : 0);
    work->key_at = take(&cursor, plan->slopes.data ? GQA_KEY_TILE * real : 0);
    work->ones = take(&cursor, tile_rows * real);
    work->row_lo = (int64_t *)(void *)take(&cursor, unit_rows * (int64_t)sizeof(int64_t));
    work->row_hi = (int64_t *)(void *)take(&cursor, unit_rows * (int64_t)sizeof(int64_t));
    work->parts = (char **)(void *)take(&cursor, work->levels * (int64_t)sizeof(char *));
    char *parts = take(&cursor, work->levels * (int64_t)plan->part_bytes);
    if (!scratch) return (size_t)(cursor - scratch);
    for (int i = 0; i < work->levels; i++) work->parts[i] = parts + (size_t)i * plan->part_bytes;
    for (int64_t i = 0; i < tile_rows; i++) gqa_put(plan->kernels, work->ones, i, 1);
    return (size_t)(cursor - scratch);
}

/* ---- begin: queries and bounds ---- */

char *gqa_query_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_work *work,
                     int64_t tile) {
    return work->query +
           tile * gqa_row_reals(plan, unit->form) * unit->form->tile_rows * (int64_t)plan->kernels->real_size;
}

/* A row of the kv head, whose queries begin at `head`: reals, or bfloat16 as it came. */
static void pack_row(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, const char *head,
                     int64_t row, char *to) {
    const char *at = head + row % plan->group * plan->query.head + row / plan->group * plan->query.row;
    struct gqa_rows from = gqa_view_rows(plan->kernels, &plan->query, at, 1, work->row);
    if (unit->form->paired) from = gqa_narrow_rows(plan, from, 1, plan->head_dim, work->row);
    memcpy(to, from.data, (size_t)plan->head_dim * (unit->form->paired ? sizeof(uint16_t) : plan->kernels->real_size));
}

/* Rows first <= r < end, zero-padded, one after another to `to`. */
static void pack_rows(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first,
                      int64_t end, int64_t room, char *to) {
    const int64_t bytes = gqa_row_reals(plan, unit->form) * (int64_t)plan->kernels->real_size;
    const char *head = gqa_operand_at(plan, &plan->query, unit->sequence, unit->kv_head * plan->group);
    memset(to, 0, (size_t)(room * bytes));
    for (int64_t r = first; r < end; r++)
        pack_row(plan, unit, work, head, unit->first_row + r, to + (r - first) * bytes);
}

/* As many rows as a vector has lanes, turned: from where they lie, or packed side by side. */
static void pack_lanes(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int64_t lanes = kernels->lanes, tile_rows = unit->form->tile_rows, width = gqa_row_reals(plan, unit->form);
    char *tile = gqa_query_tile(plan, unit, work, first / tile_rows);
    ptrdiff_t stride = (ptrdiff_t)width;
    const char *rows = NULL;
    if (unit->rows - first >= lanes && width == plan->head_dim)
        rows = gqa_even_rows(plan, unit, &plan->query, unit->first_row + first, &stride);
    if (!rows) {
        pack_rows(plan, unit, work, first, gqa_min(first + lanes, unit->rows), lanes, work->rows);
        rows = work->rows, stride = (ptrdiff_t)width;
    }
    kernels->turn(tile + first % tile_rows * (int64_t)kernels->real_size, (ptrdiff_t)tile_rows, rows, stride,
                  (int)lanes, (int)width);
}

/* Few rows lie one after another, others in lanes, whole tiles of them; reals are scaled. */
static void pack_query(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work) {
    const bool few = unit->form->few;
    const int64_t rows = few ? unit->rows : gqa_round_up(unit->rows, unit->form->tile_rows);
    if (few) pack_rows(plan, unit, work, 0, rows, rows, work->query);
    for (int64_t first = 0; first < rows && !few; first += plan->kernels->lanes) pack_lanes(plan, unit, work, first);
    const int64_t reals = gqa_min(rows, unit->form->tile_rows) * gqa_row_reals(plan, unit->form);
    for (int64_t tile = 0; tile * unit->form->tile_rows < rows && !unit->form->paired; tile++) {
        char *query = gqa_query_tile(plan, unit, work, tile);
        plan->kernels->multiply(query, query, (int)reals, plan->scale);
    }
}

/* Heads of a query see the same keys, and without a window all queries do. */
static void find_bounds(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t r) {
    const bool open = plan->left == GQA_FAR && plan->right == GQA_FAR;
    if (r > 0 && (open || (unit->first_row + r) % plan->group != 0)) {
        work->row_lo[r] = work->row_lo[r - 1], work->row_hi[r] = work->row_hi[r - 1];
        return;
    }
    gqa_plan_bounds(plan, unit, (unit->first_row + r) / plan->group, &work->row_lo[r], &work->row_hi[r]);
}

void gqa_unit_begin(const struct gqa_plan *plan, struct gqa_unit *unit, struct gqa_work *work) {
    pack_query(plan, unit, work);
    unit->lo = unit->seq_k;
    unit->hi = 0;
    for (int64_t r = 0; r < unit->rows; r++) {
        find_bounds(plan, unit, work, r);
        if (work->row_lo[r] >= work->row_hi[r]) continue;
        unit->lo = gqa_min(unit->lo, work->row_lo[r]);
        unit->hi = gqa_max(unit->hi, work->row_hi[r]);
    }
    if (unit->form->aligned) unit->lo -= unit->lo % GQA_KEY_TILE;
}
