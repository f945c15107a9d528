/* bias.c: masks, ALiBi and explicit key positions become one bias tile.
 *
 * Element (row, key) lies where its score will lie: (rows, keys) when rows are few, else (keys,
 * rows).  Called by tile.c for every tile that such a rule touches. */
#include "bias.h"

#include <math.h>
#include <string.h>

struct strides {
    ptrdiff_t row, key; /* reals */
};

static struct strides strides_of(const struct gqa_unit *unit) {
    return unit->form->few ? (struct strides){GQA_KEY_TILE, 1} : (struct strides){1, (ptrdiff_t)unit->form->tile_rows};
}

/* Rows of the mask, one after another to `to` (rows, GQA_KEY_TILE); one that heads share is read for the first
 * of them here and copied for the rest. */
static void load_mask(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t first_row, int64_t rows,
                      int64_t first_key, int keys, char *to) {
    const struct gqa_operand *mask = &plan->mask;
    const int64_t bytes = GQA_KEY_TILE * (int64_t)plan->kernels->real_size;
    const char *at = gqa_operand_at(plan, mask, unit->sequence, unit->kv_head * plan->group);
    for (int64_t r = 0; r < rows; r++, to += bytes) {
        const int64_t query = (first_row + r) / plan->group, head = (first_row + r) % plan->group;
        const char *from = at + head * mask->head + query * mask->row + first_key * mask->column;
        if (r == 0 || head == 0 || mask->head != 0)
            plan->kernels->load(to, from, mask->column, mask->dtype, mask->swapped, keys);
        else
            memcpy(to, to - bytes, (size_t)bytes);
    }
}

/* The mask, laid as scores lie; lanes without a row are set to 0. */
static void add_mask(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first_row,
                     int rows, int64_t first_key, int keys) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int lanes = kernels->lanes, width = (int)gqa_round_up(keys, lanes);
    const int64_t real = (int64_t)kernels->real_size;
    if (unit->form->few) {
        load_mask(plan, unit, first_row, rows, first_key, keys, work->bias);
        return;
    }
    for (int r = 0; r < rows; r += lanes) {
        const int64_t some = gqa_min(lanes, rows - r);
        load_mask(plan, unit, first_row + r, some, first_key, keys, work->rows);
        memset(work->rows + some * GQA_KEY_TILE * real, 0, (size_t)((lanes - some) * GQA_KEY_TILE * real));
        kernels->turn(work->bias + r * real, unit->form->tile_rows, work->rows, GQA_KEY_TILE, lanes, width);
    }
}

/* How far apart float holds distances exactly. */
static const int64_t EXACT = INT64_C(1) << 24;

/* A position relative to the tile's origin; clears *exact where a real might not hold it. */
static void put_position(const struct gqa_plan *plan, char *to, int64_t i, int64_t position, int64_t origin,
                         bool *exact) {
    const int64_t x = gqa_less(position, origin);
    gqa_put(plan->kernels, to, i, (double)x);
    if (x > EXACT || x < -EXACT) *exact = false;
}

/* Slopes and positions of a tile's rows and keys; false where some lie too far apart for `tilt`. */
static bool lay_positions(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                          int64_t first_row, int rows, int64_t first_key, int keys) {
    const struct gqa_operand *slopes = &plan->slopes;
    const int64_t origin = gqa_query_position(plan, unit, first_row / plan->group);
    const char *at = gqa_operand_at(plan, slopes, unit->sequence, 0);
    bool exact = true;
    for (int r = 0; r < rows; r++) {
        const int64_t row = first_row + r, head = unit->kv_head * plan->group + row % plan->group;
        plan->kernels->load(work->slope + r * (int64_t)plan->kernels->real_size, at + head * slopes->column, 0,
                            slopes->dtype, slopes->swapped, 1);
        put_position(plan, work->row_at, r, gqa_query_position(plan, unit, row / plan->group), origin, &exact);
    }
    for (int j = 0; j < keys; j++)
        put_position(plan, work->key_at, j, gqa_key_position(plan, unit, first_key + j), origin, &exact);
    return exact;
}

/* Slot by slot, for positions that only integers can tell apart. */
static void tilt_far(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first_row,
                     int rows, int64_t first_key, int keys) {
    const struct strides strides = strides_of(unit);
    for (int r = 0; r < rows; r++) {
        const int64_t row_at = gqa_query_position(plan, unit, (first_row + r) / plan->group);
        const double slope = gqa_get(plan->kernels, work->slope, r);
        for (int j = 0; j < keys; j++) {
            const ptrdiff_t at = r * strides.row + j * strides.key;
            const double away = (double)gqa_less(row_at, gqa_key_position(plan, unit, first_key + j));
            gqa_put(plan->kernels, work->bias, at, gqa_get(plan->kernels, work->bias, at) - slope * fabs(away));
        }
    }
}

static void add_alibi(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                      int64_t first_row, int rows, int64_t first_key, int keys) {
    const struct gqa_kernels *kernels = plan->kernels;
    const bool few = unit->form->few;
    if (lay_positions(plan, unit, work, first_row, rows, first_key, keys))
        kernels->tilt(work->bias, few ? GQA_KEY_TILE : (ptrdiff_t)unit->form->tile_rows, few ? rows : keys,
                      (int)gqa_round_up(few ? keys : rows, kernels->lanes), work->slope, work->row_at, work->key_at,
                      few);
    else
        tilt_far(plan, unit, work, first_row, rows, first_key, keys);
}

/* Explicit key positions may be in any order, so causal and window cannot be bounds. */
static void drop_by_position(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                             int64_t first_row, int rows, int64_t first_key, int keys) {
    const struct strides strides = strides_of(unit);
    for (int j = 0; j < keys; j++) {
        const int64_t key_at = gqa_key_position(plan, unit, first_key + j);
        for (int r = 0; r < rows; r++) {
            const int64_t row_at = gqa_query_position(plan, unit, (first_row + r) / plan->group);
            const int64_t ahead = gqa_less(key_at, row_at);
            if (key_at < 0 || ahead > plan->right || ahead < -plan->left)
                gqa_put(plan->kernels, work->bias, r * strides.row + j * strides.key, -INFINITY);
        }
    }
}

void gqa_bias_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t first_row,
                   int rows, int64_t first_key, int keys) {
    const int64_t cells = unit->form->few ? (int64_t)rows * GQA_KEY_TILE : keys * unit->form->tile_rows;
    if (!plan->mask.data) memset(work->bias, 0, (size_t)cells * plan->kernels->real_size);
    if (plan->mask.data) add_mask(plan, unit, work, first_row, rows, first_key, keys);
    if (plan->slopes.data) add_alibi(plan, unit, work, first_row, rows, first_key, keys);
    if (plan->key_positions.data) drop_by_position(plan, unit, work, first_row, rows, first_key, keys);
}
