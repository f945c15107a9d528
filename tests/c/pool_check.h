/* pool_check.h: what the programs that test the pool share: a count of failures, patience, children,
 * and two runs that show that the pool works. */
#ifndef POOL_CHECK_H
#define POOL_CHECK_H

#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MANY = 1000, PATIENCE_MS = 20000 };

static const struct gqa_poll never = {NULL, NULL};
static int passed, failed;

static inline void check(bool ok, const char *what)
{
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAILED: %s\n", what);
}

static inline void sleep_ms(int ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

static inline bool wait_for(atomic_int *number, int least)
{
    for (int ms = 0; ms < PATIENCE_MS; ms++) {
        if (atomic_load(number) >= least) return true;
        sleep_ms(1);
    }
    return false;
}

/* True if the child exits with 0 before the time is up; it does not outlive that. */
static inline bool child_ends_well(pid_t child)
{
    int status = -1;
    for (int ms = 0; ms < PATIENCE_MS; ms++) {
        if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
        sleep_ms(1);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return false;
}

static inline bool in_child(bool (*test)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) _exit(test() ? 0 : 1);
    return child_ends_well(child);
}

/* ---- tasks that count themselves, in scratch of their own ---- */

struct census {
    atomic_int times[MANY]; /* task i ran */
    atomic_int at_once, most_at_once, bad_scratch;
    size_t scratch_bytes;
};

static inline void count_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    struct census *census = *(struct census *const *)context;
    int now = atomic_fetch_add(&census->at_once, 1) + 1;
    int most = atomic_load(&census->most_at_once);
    while (most < now && !atomic_compare_exchange_weak(&census->most_at_once, &most, now)) continue;
    unsigned char *bytes = scratch;
    if ((uintptr_t)scratch % 64 != 0) atomic_fetch_add(&census->bad_scratch, 1);
    memset(bytes, (int)(index & 255), census->scratch_bytes);
    if (index % 7 == 0) sleep_ms(0);
    for (size_t i = 0; i < census->scratch_bytes; i++)
        if (bytes[i] != (index & 255)) atomic_fetch_add(&census->bad_scratch, 1);
    if (gqa_job_stopped(job)) atomic_fetch_add(&census->bad_scratch, 1);
    atomic_fetch_add(&census->times[index], 1);
    atomic_fetch_sub(&census->at_once, 1);
}

/* Each of count tasks ran once, all others never, and at most max_threads at a time.
 * Allocates nothing: AddressSanitizer's malloc may be left locked in a forked child. */
static inline bool counted(int64_t count, int max_threads, size_t scratch_bytes)
{
    struct census census = {.scratch_bytes = scratch_bytes}, *context = &census;
    bool ok = gqa_pool_run(count_task, &context, count, scratch_bytes, max_threads, never) == GQA_OK;
    for (int i = 0; i < MANY; i++) ok = ok && atomic_load(&census.times[i]) == (i < count);
    int most = max_threads > 0 ? max_threads : gqa_get_num_threads();
    return ok && atomic_load(&census.most_at_once) <= most && atomic_load(&census.bad_scratch) == 0;
}

/* ---- tasks that wait for each other ---- */

struct meeting {
    atomic_int arrived, done; /* threads */
    atomic_int signals_open;  /* workers that would take SIGINT, or block SIGSEGV */
    pthread_t caller;
};

/* Waits in its task until two threads are here: cannot end without a worker. */
static inline void meet_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)index, (void)scratch, (void)job;
    struct meeting *meeting = *(struct meeting *const *)context;
    atomic_fetch_add(&meeting->arrived, 1);
    if (wait_for(&meeting->arrived, 2)) atomic_fetch_add(&meeting->done, 1);
    if (pthread_equal(pthread_self(), meeting->caller)) return;
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    if (!sigismember(&blocked, SIGINT) || sigismember(&blocked, SIGSEGV)) atomic_fetch_add(&meeting->signals_open, 1);
}

static inline bool workers_help(void)
{
    struct meeting meeting = {.caller = pthread_self()}, *context = &meeting;
    gqa_set_num_threads(2);
    bool ok = gqa_pool_run(meet_task, &context, 2, 64, 0, never) == GQA_OK;
    return ok && atomic_load(&meeting.done) == 2 && atomic_load(&meeting.signals_open) == 0;
}

#endif
