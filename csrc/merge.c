/* merge.c: joins parts over disjoint keys, and stores the finished whole.
 * Called by attention.c. */
#include "merge.h"

#include <math.h>
#include <string.h>

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

static void store_lse(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t query,
                      int64_t head, double lse) {
    if (!plan->lse.data) return;
    char *to = gqa_operand_at(plan, &plan->lse, unit->sequence, head) + query * plan->lse.row;
    gqa_put(plan->kernels, work->row, 0, lse);
    plan->kernels->store(to, 0, plan->lse.dtype, plan->lse.swapped, work->row, 1, 1);
}

static void store_row(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t row,
                      const char *o, ptrdiff_t o_stride, double lse) {
    const int64_t query = row / plan->group, head = unit->kv_head * plan->group + row % plan->group;
    char *out = gqa_operand_at(plan, &plan->out, unit->sequence, head) + query * plan->out.row;
    plan->kernels->store(out, plan->out.column, plan->out.dtype, plan->out.swapped, o, o_stride, (int)plan->v_dim);
    store_lse(plan, unit, work, query, head, lse);
}

/* A sink is a part of one key with score sinks[head] and no value. */
static void join_sinks(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t tile,
                       const struct accumulators *a) {
    const struct gqa_kernels *kernels = plan->kernels;
    const struct gqa_form *form = unit->form;
    const struct gqa_operand *sinks = &plan->sinks;
    for (int64_t i = 0; i < form->stats; i++) {
        const int64_t head = unit->kv_head * plan->group + (unit->first_row + tile * form->tile_rows + i) % plan->group;
        kernels->load(work->lo + i * (int64_t)kernels->real_size, 1, sinks->data + head * sinks->column, 0,
                      sinks->dtype, sinks->swapped, 1);
    }
    kernels->join(a->m, a->l, work->lo, work->ones, work->hi, work->alpha, form->stats);
    kernels->blend(a->o, NULL, form->o_lanes, form->o_rows, form->o_lanes, work->hi, NULL, form->few);
}

void gqa_part_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part) {
    const struct gqa_kernels *kernels = plan->kernels;
    const struct gqa_form *form = unit->form;
    for (int64_t r = 0; r < unit->rows; r++) {
        const int64_t lane = r % form->tile_rows;
        const struct accumulators tile = tile_of(plan, form, part, r / form->tile_rows);
        if (lane == 0 && plan->sinks.data) join_sinks(plan, unit, work, r / form->tile_rows, &tile);
        if (lane == 0) kernels->divide(tile.o, form->o_lanes, form->o_rows, form->o_lanes, tile.l, form->few);
        const double sum = gqa_get(kernels, tile.l, lane);
        const double lse = sum == 0 ? -INFINITY : gqa_get(kernels, tile.m, lane) + log(sum);
        const char *o = tile.o + lane * (form->few ? form->o_lanes : 1) * (int64_t)kernels->real_size;
        store_row(plan, unit, work, unit->first_row + r, o, form->few ? 1 : form->o_lanes, lse);
    }
}

void gqa_padding_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work) {
    if (unit->padding) memset(work->value, 0, (size_t)plan->v_dim * plan->kernels->real_size);
    for (int64_t r = unit->rows; r < unit->rows + unit->padding; r++)
        store_row(plan, unit, work, unit->first_row + r, work->value, 1, -INFINITY);
}
