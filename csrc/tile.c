/* tile.c: one unit's walk over its keys, tile by tile.
 *
 * A tile is GQA_KEY_TILE keys at an absolute multiple.  Row tiles with no live key in
 * it never touch it; where every slot is live, nothing is masked.  A value row that a
 * row masks may hold NaN: only then, the careful product drops it by selection.
 * Called by attention.c. */
#include "tile.h"

#include <math.h>
#include <string.h>

#include "bias.h"
#include "upcoming.h"
#include "view.h"
#include "weigh.h"

/* ---- span: the keys ---- */

/* A K/V tile, loaded once for all row tiles of the unit. */
struct key_tile {
    int64_t first, end; /* keys */
    struct gqa_rows key, value;
    enum { UNKNOWN, FINITE, NOT_FINITE } state; /* of the value rows */
};

/* One row tile against one key tile. */
struct step {
    int rows;           /* rows of the tile */
    int64_t first, end; /* keys that any of them may see */
    bool masked;        /* some slot among those is masked */
    char *scores;       /* (GQA_KEY_TILE, row_tile), or (rows, GQA_KEY_TILE) */
    char *o, *m, *l;    /* its accumulators */
};

/* Rows of bfloat16 as they are, in place where they lie in one run. */
static struct gqa_rows view_pairs(const struct gqa_plan *plan, const struct gqa_unit *unit,
                                  const struct gqa_operand *operand, const struct gqa_operand *no_scales,
                                  const struct key_tile *keys, char *scratch) {
    const int64_t count = keys->end - keys->first;
    const struct gqa_run run = gqa_view_run(plan, operand, unit, keys->first, count);
    const struct gqa_rows rows = run.count == count
                                     ? gqa_stream_rows(plan->kernels, operand, run.at, count, scratch)
                                     : gqa_view_keys(plan, operand, no_scales, unit, keys->first, count, scratch);
    return gqa_narrow_rows(plan, rows, count, operand->width, scratch);
}

/* Rows of bfloat16 in whole lines, with zeros behind them. */
static struct gqa_rows whole_pairs(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                                   struct gqa_rows rows, int64_t count) {
    const int64_t stride = 2 * gqa_row_reals(plan, unit->form), width = plan->head_dim;
    for (int64_t i = 0; i < count; i++) {
        uint16_t *to = (uint16_t *)(void *)work->pairs + i * stride;
        memcpy(to, rows.data + i * rows.stride * (int64_t)sizeof *to, (size_t)width * sizeof *to);
        memset(to + width, 0, (size_t)(stride - width) * sizeof *to);
    }
    return (struct gqa_rows){work->pairs, (ptrdiff_t)stride, GQA_BFLOAT16};
}

static void load_keys(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                      struct key_tile *keys) {
    if (unit->form->paired) {
        keys->key = view_pairs(plan, unit, &plan->key, &plan->key_scales, keys, work->key);
        if (plan->kernels->whole_pairs) keys->key = whole_pairs(plan, unit, work, keys->key, keys->end - keys->first);
    } else
        keys->key =
            gqa_view_keys(plan, &plan->key, &plan->key_scales, unit, keys->first, keys->end - keys->first, work->key);
}

static void load_reals(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                       struct key_tile *keys) {
    keys->value =
        gqa_view_keys(plan, &plan->value, &plan->value_scales, unit, keys->first, keys->end - keys->first, work->value);
}

/* What turn_pairs leaves out; zeros for the rest. */
static void load_not_finite(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                            struct key_tile *keys) {
    load_reals(plan, unit, work, keys);
    float *value = (float *)(void *)work->value;
    for (int64_t i = 0; i < (keys->end - keys->first) * plan->v_dim; i++)
        if (isfinite(value[i])) value[i] = 0;
}

static bool all_finite(const struct gqa_plan *plan, const struct key_tile *keys) {
    const struct gqa_rows *value = &keys->value;
    return plan->kernels->all_finite(value->data, value->stride, value->dtype, (int)(keys->end - keys->first),
                                     (int)plan->v_dim);
}

static void load_values(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                        struct key_tile *keys) {
    keys->state = UNKNOWN;
    if (!unit->form->turned) {
        load_reals(plan, unit, work, keys);
        return;
    }
    keys->value = view_pairs(plan, unit, &plan->value, &plan->value_scales, keys, work->value);
    const bool finite = plan->kernels->turn_pairs(work->turned, keys->value.data, keys->value.stride,
                                                  (int)(keys->end - keys->first), (int)plan->v_dim);
    keys->state = finite ? FINITE : NOT_FINITE;
    if (!finite) load_not_finite(plan, unit, work, keys);
}

static struct step find_step(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_work *work,
                             int64_t tile, const struct key_tile *keys, char *part) {
    const struct gqa_form *form = unit->form;
    const int64_t row = tile * form->tile_rows;
    struct step step = {
        .rows = (int)gqa_min(form->tile_rows, unit->rows - row), .first = keys->end, .end = keys->first};
    int64_t all_lo = keys->first, all_hi = keys->end;
    for (int64_t r = row; r < row + step.rows; r++) {
        all_lo = gqa_max(all_lo, work->row_lo[r]);
        all_hi = gqa_min(all_hi, work->row_hi[r]);
        if (work->row_lo[r] >= work->row_hi[r]) continue;
        step.first = gqa_min(step.first, work->row_lo[r]);
        step.end = gqa_max(step.end, work->row_hi[r]);
    }
    step.first = gqa_max(step.first, keys->first);
    if (form->aligned && step.first < keys->end) step.first = keys->first;
    step.end = gqa_min(step.end, keys->end);
    step.masked = plan->mask.data || plan->key_positions.data || all_lo > step.first || all_hi < step.end;
    const int64_t real = (int64_t)plan->kernels->real_size;
    const int64_t place = form->few ? keys->first % GQA_SPAN / GQA_KEY_TILE : 0;
    step.scores = work->scores + place * form->tile_rows * GQA_KEY_TILE * real;
    step.o = part + (size_t)tile * form->tile_bytes;
    step.m = step.o + (int64_t)form->o_rows * form->o_lanes * real;
    step.l = step.m + form->stats * real;
    return step;
}

/* Bounds relative to the step's first key, as reals; lanes without a row repeat the last row's. */
static void lay_bounds(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                       const struct step *step) {
    const int64_t keys = step->end - step->first;
    for (int64_t i = 0; i < unit->form->stats; i++) {
        const int64_t r = tile * unit->form->tile_rows + gqa_min(i, step->rows - 1);
        gqa_put(plan->kernels, work->lo, i, (double)gqa_max(0, gqa_min(keys, work->row_lo[r] - step->first)));
        gqa_put(plan->kernels, work->hi, i, (double)gqa_max(0, gqa_min(keys, work->row_hi[r] - step->first)));
    }
}

static int lanes_of(const struct gqa_plan *plan, const struct step *step) {
    return (int)gqa_round_up(step->rows, plan->kernels->lanes);
}

/* A masked slot's weight is 0, and 0 * NaN would leak: whether it could. */
static bool needs_care(const struct gqa_plan *plan, const struct step *step, struct key_tile *keys) {
    if (step->masked && keys->state == UNKNOWN) keys->state = all_finite(plan, keys) ? FINITE : NOT_FINITE;
    return step->masked && keys->state == NOT_FINITE;
}

/* The step's first row among rows of a key tile. */
static const char *from_first(const struct gqa_plan *plan, const struct step *step, const struct key_tile *keys,
                              const struct gqa_rows *rows) {
    const size_t size = rows->dtype == GQA_BFLOAT16 ? sizeof(uint16_t) : plan->kernels->real_size;
    return rows->data + (step->first - keys->first) * rows->stride * (int64_t)size;
}

/* Scores or weights times the scales of int8 rows.  A masked weight stays 0, also beside a scale that is NaN. */
static void scale_few(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_operand *scales,
                      const struct step *step, bool weights) {
    const int count = (int)(step->end - step->first);
    float scale[GQA_KEY_TILE] = {0};
    gqa_view_scales(plan, scales, unit, step->first, count, scale);
    if (!weights || !step->masked) {
        plan->kernels->blend(step->scores, NULL, GQA_KEY_TILE, step->rows,
                             (int)gqa_round_up(count, plan->kernels->lanes), scale, NULL, false);
        return;
    }
    for (int r = 0; r < step->rows; r++) {
        float *x = (float *)(void *)step->scores + r * GQA_KEY_TILE;
        for (int j = 0; j < count; j++) {
            const float scaled = x[j] * scale[j];
            x[j] = x[j] == 0 ? x[j] : scaled;
        }
    }
}

static void score_piece(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_work *work,
                        const struct step *step, int64_t first, const struct gqa_piece *piece) {
    const struct gqa_kernels *kernels = plan->kernels;
    char *scores = step->scores + (first - step->first) * (int64_t)kernels->real_size;
    const struct gqa_rows *key = &piece->rows;
    const int keys = (int)(piece->end - first), head_dim = (int)plan->head_dim;
    const ptrdiff_t q_reals = (ptrdiff_t)gqa_row_reals(plan, unit->form);
    if (unit->form->paired) {
        const struct gqa_rows narrow = gqa_narrow_rows(plan, *key, keys, head_dim, work->key);
        kernels->dot_pairs(scores, plan->scale, work->query, 2 * q_reals, step->rows, narrow.data, narrow.stride, keys,
                           head_dim, piece->ahead);
    } else {
        kernels->dot(scores, work->query, q_reals, step->rows, key->data, key->stride, key->dtype, keys, head_dim,
                     piece->ahead);
    }
}

static void score_few(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                      const struct step *step, const struct gqa_stream *stream) {
    struct gqa_piece piece;
    for (int64_t first = step->first; first < step->end; first = piece.end) {
        piece = gqa_stream_keys(plan, unit, stream, first, step->end, work->key);
        score_piece(plan, unit, work, step, first, &piece);
    }
    if (plan->key_scales.data) scale_few(plan, unit, &plan->key_scales, step, false);
}

static void score(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                  const struct step *step, const struct key_tile *keys, struct gqa_fetch *next) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int count = (int)(step->end - step->first), head_dim = (int)plan->head_dim;
    const char *query = gqa_query_tile(plan, unit, work, tile), *key = from_first(plan, step, keys, &keys->key);
    if (unit->form->few)
        score_few(plan, unit, work, step, &(struct gqa_stream){&plan->key, unit->hi, NULL, 0});
    else if (unit->form->paired)
        kernels->outer_pairs(step->scores, plan->scale, query, lanes_of(plan, step), key, keys->key.stride, count,
                             head_dim / 2);
    else
        kernels->outer(step->scores, NULL, query, lanes_of(plan, step), key, keys->key.stride, 1, count, head_dim,
                       next);
}

/* Scores to weights, for rows whose maxima and sums so far are m and l. */
static void soften(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                   const struct step *step, char *m, char *l) {
    const int count = (int)(step->end - step->first);
    const char *bias = plan->biased ? work->bias : NULL;
    const char *lo = step->masked ? work->lo : NULL, *hi = step->masked ? work->hi : NULL;
    if (step->masked) lay_bounds(plan, unit, work, tile, step);
    if (plan->biased)
        gqa_bias_tile(plan, unit, work, unit->first_row + tile * unit->form->tile_rows, step->rows, step->first, count);
    if (unit->form->few)
        plan->kernels->soften_rows(step->scores, bias, lo, hi, step->rows, count, plan->softcap, m, l, work->alpha);
    else
        plan->kernels->soften_lanes(step->scores, bias, lo, hi, lanes_of(plan, step), count, plan->softcap, m, l,
                                    work->alpha);
}

static struct gqa_slots slots_of(const struct gqa_unit *unit, int64_t tile, const struct step *step) {
    return (struct gqa_slots){
        .first_row = unit->first_row + tile * unit->form->tile_rows,
        .rows = step->rows,
        .first_key = step->first,
        .keys = (int)(step->end - step->first),
        .row_stride = unit->form->few ? GQA_KEY_TILE : 1,
        .key_stride = unit->form->few ? 1 : (ptrdiff_t)unit->form->tile_rows,
    };
}

static void add_values_few(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                           const struct step *step, const struct gqa_stream *stream) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int rows = step->rows, o_lanes = unit->form->o_lanes;
    if (memcmp(work->alpha, work->ones, (size_t)rows * kernels->real_size)) /* rare once the maximum is found */
        kernels->blend(step->o, NULL, o_lanes, rows, o_lanes, work->alpha, NULL, true);
    if (plan->value_scales.data) scale_few(plan, unit, &plan->value_scales, step, true);
    struct gqa_piece piece;
    for (int64_t first = step->first; first < step->end; first = piece.end) {
        piece = gqa_stream_keys(plan, unit, stream, first, step->end, work->value);
        struct key_tile keys = {.first = first, .end = piece.end, .value = piece.rows};
        gqa_outer_few *outer = needs_care(plan, step, &keys) ? kernels->outer_few_careful : kernels->outer_few;
        outer(step->o, o_lanes, piece.rows.data, piece.rows.stride, piece.rows.dtype, (int)plan->v_dim,
              step->scores + (first - step->first) * (int64_t)kernels->real_size, GQA_KEY_TILE, rows,
              (int)(piece.end - first), piece.ahead);
    }
}

static void add_reals(const struct gqa_plan *plan, const struct step *step, const char *alpha, struct key_tile *keys,
                      struct gqa_fetch *next) {
    const struct gqa_kernels *kernels = plan->kernels;
    gqa_outer *outer = needs_care(plan, step, keys) ? kernels->outer_careful : kernels->outer;
    outer(step->o, alpha, step->scores, lanes_of(plan, step), from_first(plan, step, keys, &keys->value), 1,
          keys->value.stride, (int)plan->v_dim, (int)(step->end - step->first), next);
}

/* Turned values are all finite: the others are added on their own, which changes no bit of a row that masks them. */
static void add_turned(const struct gqa_plan *plan, struct gqa_work *work, const struct step *step,
                       struct key_tile *keys) {
    plan->kernels->weigh_pairs(step->o, work->alpha, step->scores, lanes_of(plan, step), work->turned, (int)plan->v_dim,
                               (int)(step->end - step->first));
    if (keys->state == NOT_FINITE) add_reals(plan, step, work->ones, keys, NULL);
}

static void add_values(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                       const struct step *step, struct key_tile *keys, struct gqa_fetch *next) {
    if (unit->form->turned)
        add_turned(plan, work, step, keys);
    else
        add_reals(plan, step, work->alpha, keys, next);
}

static void drop_out(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t tile, const struct step *step) {
    const struct gqa_slots slots = slots_of(unit, tile, step);
    if (plan->dropout_p > 0) gqa_drop_out(plan, unit, &slots, step->scores);
}

static void clear(const struct gqa_plan *plan, const struct gqa_form *form, char *part, int64_t tiles) {
    memset(part, 0, (size_t)tiles * form->tile_bytes);
    for (int64_t tile = 0; tile < tiles; tile++) {
        char *o = part + (size_t)tile * form->tile_bytes;
        for (int64_t i = 0; i < form->stats; i++)
            gqa_put(plan->kernels, o, (int64_t)form->o_rows * form->o_lanes + i, -INFINITY);
    }
}

static int64_t next_tile(int64_t key) { return (key / GQA_KEY_TILE + 1) * GQA_KEY_TILE; }

static struct key_tile key_tile_at(int64_t first, int64_t end) {
    return (struct key_tile){.first = first, .end = gqa_min(next_tile(first), end)};
}

/* Every row tile of the unit takes its turn at each key tile. */
static void attend_lanes(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                         int64_t first, int64_t end, struct gqa_job *job) {
    for (; first < end && !gqa_job_stopped(job); first = next_tile(first)) {
        struct key_tile keys = key_tile_at(first, end);
        load_keys(plan, unit, work, &keys);
        load_values(plan, unit, work, &keys);
        struct gqa_upcoming upcoming = {.count = 0}; /* matrices ask for nothing */
        if (!unit->form->turned)
            upcoming = gqa_upcoming_after(plan, unit, keys.first, keys.end, keys.value.data == work->value);
        for (int64_t tile = 0; tile * unit->form->tile_rows < unit->rows && !gqa_job_stopped(job); tile++) {
            const struct step step = find_step(plan, unit, work, tile, &keys, part);
            if (step.first >= step.end) continue;
            score(plan, unit, work, tile, &step, &keys, gqa_upcoming_next(&upcoming));
            soften(plan, unit, work, tile, &step, step.m, step.l);
            drop_out(plan, unit, tile, &step);
            add_values(plan, unit, work, &step, &keys, gqa_upcoming_next(&upcoming));
        }
    }
}

/* First all keys of the span, then all its values: two long streams.  To change over at every tile
 * cost a tenth of the speed. */
static void attend_few(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                       int64_t first, int64_t end, struct gqa_job *job) {
    const struct gqa_stream keys_first = {&plan->key, end, &plan->value, first};
    const struct gqa_stream then_values = {&plan->value, end, &plan->key, end};
    struct step steps[GQA_SPAN / GQA_KEY_TILE];
    int live = 0;
    for (; first < end && !gqa_job_stopped(job); first = next_tile(first)) {
        const struct key_tile keys = key_tile_at(first, end);
        steps[live] = find_step(plan, unit, work, 0, &keys, part);
        if (steps[live].first < steps[live].end) score_few(plan, unit, work, &steps[live++], &keys_first);
    }
    for (int i = 0; i < live && !gqa_job_stopped(job); i++) {
        soften(plan, unit, work, 0, &steps[i], steps[i].m, steps[i].l);
        drop_out(plan, unit, 0, &steps[i]);
        add_values_few(plan, unit, work, &steps[i], &then_values);
    }
}

void gqa_unit_span(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                   int64_t first, int64_t end, struct gqa_job *job) {
    clear(plan, unit->form, part, gqa_ceil_div(unit->rows, unit->form->tile_rows));
    (unit->form->few ? attend_few : attend_lanes)(plan, unit, work, part, first, end, job);
}

/* The weights of one step: rows' maxima m and sums l are final. */
static void weigh(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                  const struct step *step, const struct key_tile *keys) {
    const bool few = unit->form->few;
    const struct gqa_slots slots = slots_of(unit, tile, step);
    const size_t stats = (size_t)unit->form->stats * plan->kernels->real_size;
    memcpy(work->final_m, step->m, stats);
    memcpy(work->final_l, step->l, stats);
    score(plan, unit, work, tile, step, keys, NULL);
    soften(plan, unit, work, tile, step, work->final_m, work->final_l);
    plan->kernels->divide(step->scores, few ? GQA_KEY_TILE : unit->form->tile_rows, few ? step->rows : slots.keys,
                          few ? (int)gqa_round_up(slots.keys, plan->kernels->lanes) : lanes_of(plan, step), step->l,
                          few);
    drop_out(plan, unit, tile, step);
    gqa_weights_store(plan, unit, work, &slots, step->scores);
}

void gqa_unit_weights(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part,
                      struct gqa_job *job) {
    for (int64_t first = unit->lo; first < unit->hi && !gqa_job_stopped(job); first = next_tile(first)) {
        struct key_tile keys = key_tile_at(first, unit->hi);
        if (!unit->form->few) load_keys(plan, unit, work, &keys);
        for (int64_t tile = 0; tile * unit->form->tile_rows < unit->rows; tile++) {
            const struct step step = find_step(plan, unit, work, tile, &keys, part);
            if (step.first < step.end) weigh(plan, unit, work, tile, &step, &keys);
        }
    }
}
