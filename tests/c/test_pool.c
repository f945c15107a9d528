/* test_pool.c: the thread pool runs what pool.h promises, and stops when told.
 *
 *   gcc -std=c11 -pthread -Icsrc tests/c/test_pool.c csrc/pool.c csrc/scratch.c -o test_pool && ./test_pool
 *
 * Also meant to run under -fsanitize=thread and -fsanitize=address,undefined. */
#define _DEFAULT_SOURCE /* fork, nanosleep and the like beside C11 */

#include "pool_check.h"

/* A huge block is to fail here, not to end the program. */
const char *__tsan_default_options(void);
const char *__asan_default_options(void);
const char *__tsan_default_options(void) { return "allocator_may_return_null=1"; }
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

static void test_each_task_runs_once(void)
{
    static const int64_t counts[] = {0, 1, 2, 3, 17, MANY};
    for (int threads = 1; threads <= 8; threads++) {
        gqa_set_num_threads(threads);
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
            for (int most = 0; most <= threads; most += 1 + threads / 3)
                check(counted(counts[i], most, 100 * i * i), "each task runs once");
    }
}

static void order_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)scratch, (void)job;
    int64_t *expected = *(int64_t *const *)context;
    if (*expected == index) ++*expected;
}

static void test_one_thread_goes_upwards(void)
{
    int64_t expected = 0, *context = &expected;
    gqa_set_num_threads(4);
    gqa_pool_run(order_task, &context, MANY, 0, 1, never);
    check(expected == MANY, "one thread runs tasks in order");
}

static void note_scratch(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)job;
    **(void **const *)context = scratch;
}

static void test_scratch_is_kept(void)
{
    void *first = NULL, *second = NULL, **context = &first;
    gqa_pool_run(note_scratch, &context, 1, 1 << 20, 1, never);
    context = &second;
    gqa_pool_run(note_scratch, &context, 1, 1 << 19, 1, never);
    check(first != NULL && first == second, "a second call finds the first one's scratch");
}

static void test_no_memory(void)
{
    struct census census = {.scratch_bytes = 0}, *context = &census;
    enum gqa_status status = gqa_pool_run(count_task, &context, MANY, SIZE_MAX / 4, 4, never);
    check(status == GQA_NO_MEMORY && atomic_load(&census.times[0]) == 0, "no memory: nothing ran");
    check(counted(MANY, 4, 64), "the call after one without memory");
}

static void test_number_of_threads(void)
{
    gqa_set_num_threads(5);
    check(gqa_get_num_threads() == 5, "set and get");
    gqa_set_num_threads(-3);
    check(gqa_get_num_threads() == 1, "at least 1");
}

/* ---- who runs what ---- */

static void test_workers_help(void)
{
    check(workers_help(), "a worker takes part, deaf to SIGINT");
    sleep_ms(20); /* it sleeps by now */
    check(workers_help(), "a sleeping worker wakes up");
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    check(!sigismember(&blocked, SIGINT), "the caller's signals are as before");
}

/* A long run beside which a second caller comes and goes. */
struct crowd {
    pthread_t caller;
    atomic_int alone;  /* tasks since a worker last took one */
    atomic_int helped; /* tasks that workers took */
    atomic_int stop;
};

static void crowd_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)scratch, (void)job;
    struct crowd *crowd = *(struct crowd *const *)context;
    if (atomic_load(&crowd->stop)) return;
    sleep_ms(1);
    if (pthread_equal(pthread_self(), crowd->caller)) {
        atomic_fetch_add(&crowd->alone, 1);
    } else {
        atomic_store(&crowd->alone, 0);
        atomic_fetch_add(&crowd->helped, 1);
    }
}

static void *long_run(void *arg)
{
    struct crowd *crowd = arg;
    crowd->caller = pthread_self();
    gqa_pool_run(crowd_task, &crowd, PATIENCE_MS, 0, 2, never);
    return NULL;
}

static void second_caller(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)scratch, (void)job;
    struct crowd *crowd = *(struct crowd *const *)context;
    atomic_store(&crowd->alone, 0);
    check(wait_for(&crowd->alone, 100), "a worker makes room for a second caller");
    atomic_store(&crowd->helped, 0);
}

static void test_workers_make_room(void)
{
    struct crowd crowd = {.stop = 0}, *context = &crowd;
    gqa_set_num_threads(2);
    pthread_t thread;
    pthread_create(&thread, NULL, long_run, &crowd);
    check(wait_for(&crowd.helped, 5), "a worker helps a long run");
    gqa_pool_run(second_caller, &context, 1, 0, 2, never);
    check(wait_for(&crowd.helped, 5), "the worker comes back when the second caller is gone");
    atomic_store(&crowd.stop, 1);
    pthread_join(thread, NULL);
}

static void *many_runs(void *failures)
{
    for (int i = 0; i < 300; i++)
        if (!counted(1 + i % 40, 1 + i % 4, 256)) atomic_fetch_add((atomic_int *)failures, 1);
    return NULL;
}

static void test_many_callers(void)
{
    enum { CALLERS = 6 }; /* more than there are kept scratch blocks */
    atomic_int failures = 0;
    pthread_t threads[CALLERS];
    gqa_set_num_threads(4);
    for (int i = 0; i < CALLERS; i++) pthread_create(&threads[i], NULL, many_runs, &failures);
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
    check(failures == 0, "callers at the same time");
}

/* ---- interruption ---- */

struct patience {
    pthread_t caller;
    atomic_int arrived, running, asked;
    bool foreign; /* some other thread asked */
};

static bool impatient(void *arg)
{
    struct patience *patience = arg;
    atomic_fetch_add(&patience->asked, 1);
    if (!pthread_equal(pthread_self(), patience->caller)) patience->foreign = true;
    return atomic_load(&patience->asked) >= 2;
}

static void short_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)scratch, (void)job;
    struct patience *patience = *(struct patience *const *)context;
    atomic_fetch_add(&patience->running, 1);
    sleep_ms(1);
    atomic_fetch_sub(&patience->running, 1);
}

static void endless_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)scratch;
    struct patience *patience = *(struct patience *const *)context;
    atomic_fetch_add(&patience->running, 1);
    while (!gqa_job_stopped(job)) sleep_ms(1);
    atomic_fetch_sub(&patience->running, 1);
}

/* The caller's task ends once a worker is in the other, which only a poll can end. */
static void left_alone_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    struct patience *patience = *(struct patience *const *)context;
    atomic_fetch_add(&patience->arrived, 1);
    if (!wait_for(&patience->arrived, 2)) return;
    if (!pthread_equal(pthread_self(), patience->caller)) endless_task(context, index, scratch, job);
}

static void check_interrupted(gqa_task *task, int64_t count, int threads, const char *what)
{
    struct patience patience = {.caller = pthread_self()}, *context = &patience;
    struct gqa_poll poll = {impatient, &patience};
    check(gqa_pool_run(task, &context, count, 64, threads, poll) == GQA_INTERRUPTED, what);
    check(atomic_load(&patience.running) == 0, "nothing runs after an interruption");
    check(atomic_load(&patience.asked) == 2 && !patience.foreign, "the caller asks, and not again after a stop");
    check(counted(MANY, threads, 64), "the call after an interruption");
}

static void test_interruption(void)
{
    gqa_set_num_threads(3);
    for (int threads = 1; threads <= 3; threads++) {
        check_interrupted(short_task, 1 << 20, threads, "interrupted between tasks");
        check_interrupted(endless_task, 5, threads, "interrupted inside a task");
    }
    check_interrupted(left_alone_task, 2, 2, "interrupted while waiting for a worker");
}

static void test_poll_is_rare(void)
{
    struct patience patience = {.caller = pthread_self()};
    struct gqa_poll poll = {impatient, &patience};
    void *scratch, **context = &scratch;
    bool ok = gqa_pool_run(note_scratch, &context, 2, 0, 1, poll) == GQA_OK;
    check(ok && atomic_load(&patience.asked) == 0, "a short call does not poll");
}

int main(void)
{
    alarm(240); /* a deadlock is a failure, not a wait */
    test_number_of_threads();
    test_each_task_runs_once();
    test_one_thread_goes_upwards();
    test_scratch_is_kept();
    test_no_memory();
    test_workers_help();
    test_workers_make_room();
    test_many_callers();
    test_interruption();
    test_poll_is_rare();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
