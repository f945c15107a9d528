/* upcoming.c: what many rows will read next.  See upcoming.h. */
#include "upcoming.h"

#include "view.h"

static void expect(struct gqa_upcoming *upcoming, struct gqa_fetch part) {
    if (part.rows > 0) upcoming->part[upcoming->count++] = part;
}

struct gqa_fetch *gqa_upcoming_next(struct gqa_upcoming *upcoming) {
    for (int i = 0; i < upcoming->count; i++)
        if (upcoming->part[i].rows > 0) return &upcoming->part[i];
    return NULL;
}

/* The keys from `first` on, at most a tile of them, as far as they lie in one run. */
static struct gqa_fetch keys_to_come(const struct gqa_plan *plan, const struct gqa_unit *unit,
                                     const struct gqa_operand *operand, int64_t first, int64_t end) {
    if (first >= end || operand->column != operand->size) return (struct gqa_fetch){0};
    const struct gqa_run run = gqa_view_run(plan, operand, unit, first, gqa_min(GQA_KEY_TILE, end - first));
    return gqa_rows_to_come((uintptr_t)run.at, operand->row, run.count, operand->width * operand->size,
                            GQA_FETCH_LINES);
}

/* A unit's queries: of all its heads where heads or queries follow each other in memory, else of the first. */
static struct gqa_fetch queries_to_come(const struct gqa_plan *plan, const struct gqa_unit *unit) {
    const struct gqa_operand *query = &plan->query;
    const int64_t width = query->width * query->size;
    const int64_t first = unit->first_row / plan->group, count = gqa_ceil_div(unit->rows, plan->group);
    if (query->column != query->size) return (struct gqa_fetch){0};
    const uintptr_t at = (uintptr_t)gqa_operand_at(plan, query, unit->sequence, unit->kv_head * plan->group) +
                         (uintptr_t)(first * query->row);
    if (query->row == width) return gqa_rows_to_come(at, query->head, plan->group, count * width, GQA_FETCH_LINES);
    return gqa_rows_to_come(at, query->row, count, query->head == width ? plan->group * width : width, GQA_FETCH_LINES);
}

/* Queries first: they are packed before keys are read.  Rows after the first seldom see an earlier key. */
static void expect_unit(struct gqa_upcoming *upcoming, const struct gqa_plan *plan, int64_t index, bool loaded) {
    if (index == plan->units) return;
    const struct gqa_unit unit = gqa_plan_unit(plan, index);
    int64_t lo, hi;
    if (unit.rows == 0) return;
    gqa_plan_bounds(plan, &unit, unit.first_row / plan->group, &lo, &hi);
    expect(upcoming, queries_to_come(plan, &unit));
    expect(upcoming, keys_to_come(plan, &unit, &plan->key, lo, unit.seq_k));
    if (loaded) expect(upcoming, keys_to_come(plan, &unit, &plan->value, lo, unit.seq_k));
}

struct gqa_upcoming gqa_upcoming_after(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t first,
                                       int64_t end, bool loaded) {
    struct gqa_upcoming upcoming = {.count = 0};
    expect(&upcoming, keys_to_come(plan, unit, &plan->value, loaded ? end : first, unit->hi));
    expect(&upcoming, keys_to_come(plan, unit, &plan->key, end, unit->hi));
    if (end >= unit->hi) expect_unit(&upcoming, plan, unit->after, loaded);
    return upcoming;
}
