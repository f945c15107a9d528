/* read_speed.c: sum a buffer with several threads, as fast as memory delivers it.
 *
 * The yardstick for decode: attention over one row cannot go faster than a
 * plain read of the same K and V.  read_speed.py compiles this file at run
 * time; nothing else uses it.  Threads are started by every call, some 30 us
 * each, which is below 1 % of the works it is the yardstick for. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_THREADS = 256, LANES = 4 };

/* The compilers' own vectors: what they make of a plain loop differs tenfold. */
typedef int64_t vec __attribute__((vector_size(32)));

struct slice {
    const vec *vecs;
    size_t count;
    vec sum;
};

/* LANES independent sums keep the adders ahead of memory. */
static void *sum_slice(void *arg)
{
    struct slice *s = arg;
    vec lanes[LANES] = {{0}};
    size_t i = 0;

    for (; i + LANES <= s->count; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane)
            lanes[lane] += s->vecs[i + lane];
    for (; i < s->count; ++i)
        lanes[0] += s->vecs[i];
    s->sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    return NULL;
}

/* Sum of the 8-byte words in `bytes` bytes at `data` (aligned to 32, the rest
 * of the last 32 left out), one slice a thread.  A thread that cannot be
 * started leaves its slice to the caller. */
int64_t read_speed_sum(const void *data, size_t bytes, size_t threads)
{
    const vec *vecs = data;
    size_t count = bytes / sizeof *vecs;
    struct slice slices[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    vec sum = {0};

    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    for (size_t t = 0; t < threads; ++t) {
        size_t begin = count * t / threads, end = count * (t + 1) / threads;

        slices[t] = (struct slice){vecs + begin, end - begin, {0}};
        if (t > 0)
            started[t] = pthread_create(&ids[t], NULL, sum_slice, &slices[t]) == 0;
    }
    for (size_t t = 0; t < threads; ++t)
        if (!started[t])
            sum_slice(&slices[t]);
    for (size_t t = 0; t < threads; ++t) {
        if (started[t])
            pthread_join(ids[t], NULL);
        sum += slices[t].sum;
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}
