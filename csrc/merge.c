/* merge.c: joins parts over disjoint keys, and stores the finished whole.
 * Called by attention.c. */
#include "merge.h"

#include <math.h>
#include <string.h>

#include "view.h"

struct accumulators {
    char *o, *m, *l;
};

static struct accumulators tile_of(const struct gqa_plan *plan, const struct gqa_form *form, char *part, int64_t tile) {
    const int64_t real = (int64_t)plan->kernels->real_size;
    char *o = part + (size_t)tile * form->tile_bytes;
    char *m = o + (int64_t)form->o_rows * form->o_lanes * real;
    return (struct accumulators){o, m, m + form->stats * real};
}

/* left takes right in; a row without live keys on one side keeps the other's bits. */
static void join_parts(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *left,
                       char *right) {
    const struct gqa_kernels *kernels = plan->kernels;
    const struct gqa_form *form = unit->form;
    for (int64_t tile = 0; tile * form->tile_rows < unit->rows; tile++) {
        const struct accumulators a = tile_of(plan, form, left, tile), b = tile_of(plan, form, right, tile);
        kernels->join(a.m, a.l, b.m, b.l, work->lo, work->hi, form->stats);
        kernels->blend(a.o, b.o, form->o_lanes, form->o_rows, form->o_lanes, work->lo, work->hi, form->few);
    }
}

static void swap(char **a, char **b) {
    char *kept = *a;
    *a = *b;
    *b = kept;
}

void gqa_fold_add(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                  struct gqa_fold *fold, int64_t index) {
    char **made = &work->parts[work->levels - 1];
    int level = fold->first_level;
    for (; index & 1; index >>= 1, level++)
        if (fold->held >> level & 1) {
            join_parts(plan, unit, work, work->parts[level], *made);
            swap(&work->parts[level], made);
            fold->held &= ~(UINT64_C(1) << level);
        }
    swap(&work->parts[level], made);
    fold->held |= UINT64_C(1) << level;
}

char *gqa_fold_end(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                   struct gqa_fold *fold) {
    char *whole = NULL;
    for (int level = 0; fold->held >> level; level++)
        if (fold->held >> level & 1) {
            if (whole) join_parts(plan, unit, work, work->parts[level], whole);
            whole = work->parts[level];
        }
    return whole;
}

static void store_lse(const struct gqa_plan *plan, struct gqa_work *work, char *to, double m, double l) {
    gqa_put(plan->kernels, work->row, 0, l == 0 ? -INFINITY : m + log(l));
    plan->kernels->store(to, 0, plan->lse.dtype, plan->lse.swapped, work->row, 1);
}

/* A finished row of the kv head: its output o, and the log of the sum of exp, from its maximum and sum. */
static void store_row(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t row,
                      const char *o, double m, double l) {
    const int64_t query = row / plan->group, head = unit->kv_head * plan->group + row % plan->group;
    const struct gqa_operand *out = &plan->out, *lse = &plan->lse;
    plan->kernels->store(gqa_operand_at(plan, out, unit->sequence, head) + query * out->row, out->column, out->dtype,
                         out->swapped, o, (int)plan->v_dim);
    if (lse->data) store_lse(plan, work, gqa_operand_at(plan, lse, unit->sequence, head) + query * lse->row, m, l);
}

/* A sink is a part of one key with score sinks[head] and no value. */
static void join_sinks(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                       const struct accumulators *a) {
    const struct gqa_kernels *kernels = plan->kernels;
    const struct gqa_form *form = unit->form;
    const struct gqa_operand *sinks = &plan->sinks;
    for (int64_t i = 0; i < form->stats; i++) {
        const int64_t head = unit->kv_head * plan->group + (unit->first_row + tile * form->tile_rows + i) % plan->group;
        kernels->load(work->lo + i * (int64_t)kernels->real_size, sinks->data + head * sinks->column, 0, sinks->dtype,
                      sinks->swapped, 1);
    }
    kernels->join(a->m, a->l, work->lo, work->ones, work->hi, work->alpha, form->stats);
    kernels->blend(a->o, NULL, form->o_lanes, form->o_rows, form->o_lanes, work->hi, NULL, form->few);
}

/* As many rows as a vector has lanes, turned to where they go. */
static bool store_lanes(const struct gqa_plan *plan, const struct gqa_unit *unit, const char *o, int64_t row,
                        int64_t rows) {
    const struct gqa_kernels *kernels = plan->kernels;
    ptrdiff_t stride;
    if (unit->form->few || plan->lse.data || rows < kernels->lanes || plan->v_dim % kernels->lanes != 0) return false;
    char *to = gqa_even_rows(plan, unit, &plan->out, row, &stride);
    if (to) kernels->turn(to, stride, o, unit->form->o_lanes, (int)plan->v_dim, kernels->lanes);
    return to != NULL;
}

/* A tile's finished rows from `first` on, one vector's lanes of them turned into rows. */
static void store_outputs(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                          const struct accumulators *a, int64_t first, int64_t end) {
    const struct gqa_kernels *kernels = plan->kernels;
    const struct gqa_form *form = unit->form;
    const int64_t real = (int64_t)kernels->real_size, row = unit->first_row + tile * form->tile_rows;
    const int64_t width = form->few ? form->o_lanes : form->o_rows;
    if (store_lanes(plan, unit, a->o + first * real, row + first, end - first)) return;
    const char *rows = form->few ? a->o + first * width * real : work->rows;
    if (!form->few) kernels->turn(work->rows, width, a->o + first * real, form->o_lanes, form->o_rows, kernels->lanes);
    for (int64_t i = first; i < end; i++)
        store_row(plan, unit, work, row + i, rows + (i - first) * width * real, gqa_get(kernels, a->m, i),
                  gqa_get(kernels, a->l, i));
}

void gqa_part_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part) {
    const struct gqa_form *form = unit->form;
    const int64_t side = form->few ? form->tile_rows : plan->kernels->lanes;
    for (int64_t tile = 0; tile * form->tile_rows < unit->rows; tile++) {
        const struct accumulators a = tile_of(plan, form, part, tile);
        const int64_t rows = gqa_min(form->tile_rows, unit->rows - tile * form->tile_rows);
        if (plan->sinks.data) join_sinks(plan, unit, work, tile, &a);
        plan->kernels->divide(a.o, form->o_lanes, form->o_rows, form->o_lanes, a.l, form->few);
        for (int64_t first = 0; first < rows; first += side)
            store_outputs(plan, unit, work, tile, &a, first, gqa_min(first + side, rows));
    }
}

void gqa_padding_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work) {
    if (unit->padding) memset(work->value, 0, (size_t)plan->v_dim * plan->kernels->real_size);
    for (int64_t r = unit->rows; r < unit->rows + unit->padding; r++)
        store_row(plan, unit, work, unit->first_row + r, work->value, 0, 0);
}
