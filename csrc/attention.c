/* attention.c: scaled dot-product attention, from the problem to the pool.
 *
 * The call is cut into units (plan.c); a task makes the parts of a unit's spans
 * (tile.c) and joins them (merge.c).  Where units are fewer than threads, the spans of
 * a unit are cut into chunks, whose parts are joined by whoever finishes last: the
 * same tree of joins, so the same bits.  Called by python/attention.c. */
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "merge.h"
#include "scratch.h"
#include "tile.h"

/* Multiply-adds below which waking another thread costs more than it gains. */
static const double SMALL_CALL = 1 << 20;

struct call {
    const struct gqa_plan *plan;
    char *chunk_parts;   /* (units, chunks) parts, when chunks > 1 */
    atomic_int *missing; /* (units,) chunks not yet made */
};

/* Makes and folds the parts of the unit's keys lo <= j < hi; at least one part, even of no key. */
static char *walk(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                  struct gqa_job *job) {
    struct gqa_fold fold = {0};
    int64_t span = unit->lo / GQA_SPAN;
    do {
        const int64_t first = gqa_max(unit->lo, span * GQA_SPAN), end = gqa_min(unit->hi, (span + 1) * GQA_SPAN);
        gqa_unit_span(plan, unit, work, work->parts[work->levels - 1], first, end, job);
        gqa_fold_add(plan, unit, work, &fold, span++);
    } while (span * GQA_SPAN < unit->hi && !gqa_job_stopped(job));
    return gqa_fold_end(plan, unit, work, &fold);
}

static char *join_chunks(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                         const char *chunk_parts) {
    struct gqa_fold fold = {.first_level = plan->chunk_level};
    for (int64_t chunk = 0; chunk < plan->chunks; chunk++) {
        memcpy(work->parts[work->levels - 1], chunk_parts + (size_t)chunk * plan->part_bytes, plan->part_bytes);
        gqa_fold_add(plan, unit, work, &fold, chunk);
    }
    return gqa_fold_end(plan, unit, work, &fold);
}

static void whole_unit(const void *context, int64_t index, void *scratch, struct gqa_job *job) {
    const struct gqa_plan *plan = ((const struct call *)context)->plan;
    struct gqa_unit unit = gqa_plan_unit(plan, index);
    struct gqa_work work;
    gqa_work_lay(plan, &work, scratch);
    gqa_padding_store(plan, &unit, &work);
    if (unit.rows == 0) return;
    gqa_unit_begin(plan, &unit, &work);
    char *part = walk(plan, &unit, &work, job);
    gqa_part_store(plan, &unit, &work, part);
    if (plan->weights.data) gqa_unit_weights(plan, &unit, &work, part, job);
}

static void chunk_of_unit(const void *context, int64_t index, void *scratch, struct gqa_job *job) {
    const struct call *call = context;
    const struct gqa_plan *plan = call->plan;
    const int64_t unit_index = index / plan->chunks, chunk = index % plan->chunks;
    const int64_t keys = (int64_t)GQA_SPAN << plan->chunk_level;
    struct gqa_unit unit = gqa_plan_unit(plan, unit_index);
    struct gqa_work work;
    gqa_work_lay(plan, &work, scratch);
    gqa_unit_begin(plan, &unit, &work);
    struct gqa_unit mine = unit;
    mine.lo = gqa_max(unit.lo, chunk * keys);
    mine.hi = gqa_min(unit.hi, (chunk + 1) * keys);
    mine.after = plan->units;
    char *parts = call->chunk_parts + (size_t)(unit_index * plan->chunks) * plan->part_bytes;
    memcpy(parts + (size_t)chunk * plan->part_bytes, walk(plan, &mine, &work, job), plan->part_bytes);
    if (atomic_fetch_sub(&call->missing[unit_index], 1) != 1) return;
    gqa_padding_store(plan, &unit, &work);
    char *part = join_chunks(plan, &unit, &work, parts);
    gqa_part_store(plan, &unit, &work, part);
    if (plan->weights.data) gqa_unit_weights(plan, &unit, &work, part, job);
}

static enum gqa_status run_chunked(const struct gqa_plan *plan, size_t scratch, int threads, struct gqa_poll poll) {
    const size_t part_bytes = (size_t)(plan->units * plan->chunks) * plan->part_bytes;
    struct scratch own = {0}, *block = scratch_borrow(&own);
    enum gqa_status status = GQA_NO_MEMORY;
    if (scratch_reserve(block, part_bytes + (size_t)plan->units * sizeof(atomic_int))) {
        char *parts = block->data;
        const struct call call = {plan, parts, (atomic_int *)(void *)(parts + part_bytes)};
        for (int64_t i = 0; i < plan->units; i++) atomic_init(&call.missing[i], (int)plan->chunks);
        status = gqa_pool_run(chunk_of_unit, &call, plan->units * plan->chunks, scratch, threads, poll);
    }
    scratch_return(block, &own);
    return status;
}

static int threads_for(const struct gqa_attention *problem) {
    const struct gqa_array *query = &problem->query;
    double work = 2; /* a product with K and one with V, of about the same width */
    for (int i = 0; i < query->ndim; i++) work *= (double)query->shape[i];
    work *= (double)gqa_seq_k(problem);
    return work < SMALL_CALL ? 1 : gqa_get_num_threads();
}

enum gqa_status gqa_attention_run(const struct gqa_attention *problem, struct gqa_poll poll) {
    struct gqa_plan plan;
    struct gqa_work work;
    const int threads = threads_for(problem);
    const enum gqa_status status = gqa_plan_make(&plan, problem, threads);
    if (status != GQA_OK || plan.units == 0) return status;
    const size_t scratch = gqa_work_lay(&plan, &work, NULL);
    if (plan.chunks > 1) return run_chunked(&plan, scratch, threads, poll);
    const struct call call = {.plan = &plan};
    return gqa_pool_run(whole_unit, &call, plan.units, scratch, threads, poll);
}
