/* read_speed.c: sum a buffer with several threads, as fast as memory delivers it.
 *
 * The yardstick for decode: attention over one row cannot go faster than a
 * plain read of the same K and V.  read_speed.py compiles this file at run time
 * with OpenMP, whose threads stay awake from one call of a sample to the next,
 * as torch's and ONNX Runtime's do; nothing else uses it. */
#include <stddef.h>
#include <stdint.h>

enum { LANES = 4 };

/* The compilers' own vectors: what they make of a plain loop differs tenfold. */
typedef int64_t vec __attribute__((vector_size(32)));

/* LANES independent sums keep the adders ahead of memory. */
static int64_t sum_slice(const vec *vecs, size_t count)
{
    vec lanes[LANES] = {{0}};
    size_t i = 0;

    for (; i + LANES <= count; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane)
            lanes[lane] += vecs[i + lane];
    for (; i < count; ++i)
        lanes[0] += vecs[i];
    lanes[0] += lanes[1] + (lanes[2] + lanes[3]);
    return lanes[0][0] + lanes[0][1] + (lanes[0][2] + lanes[0][3]);
}

/* Sum of the 8-byte words in `bytes` bytes at `data` (aligned to 32; the rest
 * of the last 32 is left out), one slice a thread. */
int64_t read_speed_sum(const void *data, size_t bytes, int threads)
{
    const vec *vecs = data;
    size_t count = bytes / sizeof *vecs, parts = (size_t)threads;
    int64_t sum = 0;

#pragma omp parallel for num_threads(threads) reduction(+ : sum)
    for (size_t t = 0; t < parts; ++t) {
        size_t begin = count * t / parts, end = count * (t + 1) / parts;

        sum += sum_slice(vecs + begin, end - begin);
    }
    return sum;
}
