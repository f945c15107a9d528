/* pool.h: runs the tasks of one call on a few threads, the caller among them.
 *
 * Workers start when first needed, sleep between calls, and are forgotten by a
 * forked child, which starts its own.  One call owns the workers at a time; a
 * second caller works alone rather than wait.  Used by attention.c, convert.c, rope.c and cache.c. */
#ifndef GQA_POOL_H
#define GQA_POOL_H

#include "gqa.h"

struct gqa_job;

/* scratch: this thread's scratch_bytes, 64-byte aligned, not cleared, reused between tasks. */
typedef void gqa_task(const void *context, int64_t index, void *scratch, struct gqa_job *job);

/* Runs task(context, 0..count-1), each once, in any order and on any thread, low
 * indices started first.  Returns GQA_OK, GQA_NO_MEMORY (nothing ran) or
 * GQA_INTERRUPTED (some tasks did not run or did not finish). */
enum gqa_status gqa_pool_run(gqa_task *task, const void *context, int64_t count, size_t scratch_bytes, int max_threads,
                             struct gqa_poll poll);

/* For long tasks: true once the call was told to stop; the task then returns early.
 * Cheap enough for every few microseconds; on the calling thread it also polls. */
bool gqa_job_stopped(struct gqa_job *job);

#endif
