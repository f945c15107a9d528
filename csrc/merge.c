/* merge.c: joins parts over disjoint keys, and stores the finished whole.
 * Called by attention.c. */
#include "merge.h"

#include <math.h>

struct accumulators {
    char *o, *m, *l;
};

static struct accumulators tile_of(const struct gqa_plan *plan, char *part, int64_t tile) {
    const int64_t real = (int64_t)plan->kernels->real_size;
    char *o = part + (size_t)tile * plan->tile_bytes;
    char *m = o + (int64_t)plan->o_rows * plan->o_lanes * real;
    return (struct accumulators){o, m, m + plan->stats * real};
}

/* left takes right in; a row without live keys on one side keeps the other's bits. */
static void join_parts(const struct gqa_plan *plan, struct gqa_work *work, char *left, char *right, int64_t tiles) {
    const struct gqa_kernels *kernels = plan->kernels;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const struct accumulators a = tile_of(plan, left, tile), b = tile_of(plan, right, tile);
        kernels->join(a.m, a.l, b.m, b.l, work->lo, work->hi, plan->stats);
        kernels->blend(a.o, b.o, plan->o_lanes, plan->o_rows, plan->o_lanes, work->lo, work->hi, plan->few);
    }
}

static void swap(char **a, char **b) {
    char *kept = *a;
    *a = *b;
    *b = kept;
}

void gqa_fold_add(const struct gqa_plan *plan, struct gqa_work *work, struct gqa_fold *fold, int64_t index,
                  int64_t tiles) {
    char **made = &work->parts[work->levels - 1];
    int level = fold->first_level;
    for (; index & 1; index >>= 1, level++)
        if (fold->held >> level & 1) {
            join_parts(plan, work, work->parts[level], *made, tiles);
            swap(&work->parts[level], made);
            fold->held &= ~(UINT64_C(1) << level);
        }
    swap(&work->parts[level], made);
    fold->held |= UINT64_C(1) << level;
}

char *gqa_fold_end(const struct gqa_plan *plan, struct gqa_work *work, struct gqa_fold *fold, int64_t tiles) {
    char *whole = NULL;
    for (int level = 0; fold->held >> level; level++)
        if (fold->held >> level & 1) {
            if (whole) join_parts(plan, work, work->parts[level], whole, tiles);
            whole = work->parts[level];
        }
    return whole;
}

static void store_row(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, int64_t row,
                      const char *o, ptrdiff_t o_stride, double lse) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int64_t query = row / plan->group, head = unit->kv_head * plan->group + row % plan->group;
    char *out = gqa_operand_at(plan, &plan->out, unit->sequence, head) + query * plan->out.row;
    kernels->store(out, plan->out.column, plan->out.swapped, o, o_stride, (int)plan->v_dim);
    if (!plan->lse.data) return;
    gqa_put(kernels, work->row, 0, lse);
    char *to = gqa_operand_at(plan, &plan->lse, unit->sequence, head) + query * plan->lse.row;
    kernels->store(to, 0, plan->lse.swapped, work->row, 1, 1);
}

void gqa_part_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work, char *part) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int64_t real = (int64_t)kernels->real_size;
    for (int64_t r = 0; r < unit->rows; r++) {
        const struct accumulators tile = tile_of(plan, part, r / plan->tile_rows);
        const int64_t lane = r % plan->tile_rows;
        if (lane == 0) kernels->divide(tile.o, plan->o_lanes, plan->o_rows, plan->o_lanes, tile.l, plan->few);
        const double sum = gqa_get(kernels, tile.l, lane);
        const double lse = sum == 0 ? -INFINITY : gqa_get(kernels, tile.m, lane) + log(sum);
        const char *o = tile.o + lane * (plan->few ? plan->o_lanes : 1) * real;
        store_row(plan, unit, work, unit->first_row + r, o, plan->few ? 1 : plan->o_lanes, lse);
    }
}
