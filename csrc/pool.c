/* pool.c: the thread pool of pool.h.
 *
 * One static struct holds all that threads share.  Its `door` is the protocol
 * between the call that owns the workers and the workers: two numbers in one word,
 * how many seats the run has for workers and how many are inside.  A worker enters
 * by raising the second while it is below the first; the owner closes the door (no
 * seats) and may return once nobody is inside.  The mutex guards falling asleep and
 * waking only: a call that finds its workers still spinning takes no lock.
 *
 * Atomics are sequentially consistent because sleepers rely on it: one side writes
 * door and reads sleeping, the other writes sleeping and reads door. */
#define _POSIX_C_SOURCE 200809L

#include "pool.h"
#include "scratch.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum {
    MAX_WORKERS = 1023,
    STACK_BYTES = 1 << 20, /* tasks keep their data in scratch */
    CACHE_LINE = 64,
    CALLS_BETWEEN_STARTS = 100, /* after the system refused a thread */
    SPIN_NS = 100 * 1000,       /* a spinning worker starts after 1.5 us, a sleeping one after 20 */
    POLL_NS = 10 * 1000 * 1000,
};

/* One call of gqa_pool_run; lives on its caller's stack. */
struct run {
    gqa_task *task;
    const void *context;
    int64_t count;
    size_t scratch_bytes;
    struct gqa_poll poll;
    int64_t next_poll_ns;     /* read and written by the caller only */
    unsigned fork_generation; /* pool's at the start */
    int seats;                /* for workers; 0 = the caller works alone */
    struct scratch *scratch;  /* the caller's: own_scratch or a kept one */
    struct scratch own_scratch;
    atomic_bool stopped;
    _Alignas(CACHE_LINE) _Atomic int64_t next; /* task to hand out; ends above count */
};

/* What a task gets: the run as seen by one of its threads. */
struct gqa_job {
    struct run *run;
    bool is_caller;
};

static struct {
    pthread_mutex_t lock;    /* never held while a task or a poll runs */
    pthread_cond_t wake;     /* to workers: the door is open */
    pthread_cond_t left;     /* to the owner: the last worker left */
    atomic_int sleeping;     /* workers in wake; changed under lock */
    atomic_bool owner_waits; /* changed under lock */
    atomic_bool owned;       /* who sets it has workers, pauses and run */
    int workers;             /* started */
    int pauses;              /* calls to go before the next try to start one */
    struct run *run;         /* valid for whoever is inside */
    unsigned fork_generation;
    atomic_int limit;                           /* threads that should compute at a time */
    atomic_int computing;                       /* threads that do: callers and workers inside */
    _Alignas(CACHE_LINE) _Atomic uint64_t door; /* seats in the high half, inside in the low */
} pool = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
    .limit = 1,
};

/* ---- time ---- */

#ifdef CLOCK_MONOTONIC_COARSE
static const clockid_t poll_clock = CLOCK_MONOTONIC_COARSE; /* a few ns; ticks of 1 to 10 ms do */
#else
static const clockid_t poll_clock = CLOCK_MONOTONIC;
#endif

static int64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __asm__ __volatile__("pause");
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Yields because the thread waited for may be queued behind this one: without it two
 * threads that were put on one core take longer than one. */
static bool spin_until(bool (*ready)(void)) {
    for (int64_t end = now_ns(CLOCK_MONOTONIC) + SPIN_NS; now_ns(CLOCK_MONOTONIC) < end; sched_yield())
        for (int i = 0; i < 20; i++, relax())
            if (ready()) return true;
    return ready();
}

/* ---- the door ---- */

static uint32_t seats(uint64_t door) { return (uint32_t)(door >> 32); }
static uint32_t inside(uint64_t door) { return (uint32_t)door; }

static bool nobody_inside(void) { return inside(atomic_load(&pool.door)) == 0; }

static bool seat_free(void) {
    uint64_t door = atomic_load(&pool.door);
    return inside(door) < seats(door) && atomic_load(&pool.computing) < atomic_load(&pool.limit);
}

static bool crowded(void) { return atomic_load(&pool.computing) > atomic_load(&pool.limit); }

static bool enter(void) {
    if (atomic_fetch_add(&pool.computing, 1) < atomic_load(&pool.limit)) {
        uint64_t door = atomic_load(&pool.door);
        while (inside(door) < seats(door))
            if (atomic_compare_exchange_weak(&pool.door, &door, door + 1)) return true;
    }
    atomic_fetch_sub(&pool.computing, 1);
    return false;
}

static void close_door(void) { atomic_fetch_and(&pool.door, UINT32_MAX); }

/* Afterwards the run may be gone: nothing of it is touched. */
static void leave(void) {
    atomic_fetch_sub(&pool.computing, 1);
    uint64_t before = atomic_fetch_sub(&pool.door, 1);
    if (inside(before) > 1 || !atomic_load(&pool.owner_waits)) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_signal(&pool.left);
    pthread_mutex_unlock(&pool.lock);
}

/* A wake-up that gets lost costs speed only: the owner does the work itself. */
static void wake_workers(int wanted) {
    if (wanted <= 0 || atomic_load(&pool.sleeping) == 0) return;
    pthread_mutex_lock(&pool.lock);
    if (wanted >= atomic_load(&pool.sleeping))
        pthread_cond_broadcast(&pool.wake);
    else
        for (int i = 0; i < wanted; i++) pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static void sleep_until_wanted(void) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1);
    while (!seat_free()) pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
}

/* ---- a run, seen from any of its threads ---- */

/* A poll may run Python code, and that may fork.  The child has lost the workers
 * and with them the tasks they were in. */
static bool lost_in_fork(const struct run *run) {
    return run->seats > 0 && run->fork_generation != pool.fork_generation;
}

static void poll_caller(struct run *run) {
    if (run->poll.stop == NULL || atomic_load(&run->stopped) || now_ns(poll_clock) < run->next_poll_ns) return;
    bool stop = run->poll.stop(run->poll.arg);
    if (stop || lost_in_fork(run)) atomic_store(&run->stopped, true);
    run->next_poll_ns = now_ns(poll_clock) + POLL_NS;
}

bool gqa_job_stopped(struct gqa_job *job) {
    if (job->is_caller) poll_caller(job->run);
    return atomic_load_explicit(&job->run->stopped, memory_order_relaxed);
}

static bool run_next_task(struct gqa_job *job, void *scratch) {
    struct run *run = job->run;
    if (gqa_job_stopped(job)) return false;
    int64_t index = atomic_fetch_add(&run->next, 1);
    if (index >= run->count) return false;
    run->task(run->context, index, scratch, job);
    return true;
}

/* ---- workers ---- */

static void help(struct run *run, struct scratch *scratch) {
    struct gqa_job job = {.run = run, .is_caller = false};
    if (scratch_reserve(scratch, run->scratch_bytes))
        while (run_next_task(&job, scratch->data))
            if (crowded()) return; /* the seat stays free for when others have gone */
    close_door();
}

static void *worker_main(void *unused) {
    struct scratch scratch = {0};
    for (;;) {
        if (!spin_until(seat_free)) sleep_until_wanted();
        if (!enter()) continue;
        help(pool.run, &scratch);
        scratch_trim(&scratch);
        leave();
    }
    return unused;
}

/* Signals are for the threads that know of them; faults stay where they happen. */
static void worker_signals(sigset_t *blocked) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
    sigfillset(blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(blocked, faults[i]);
}

static bool start_worker(void) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigset_t blocked, before;
    worker_signals(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &before); /* inherited, so there is no unmasked moment */
    pthread_t thread;
    int refused = pthread_create(&thread, &attributes, worker_main, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return !refused;
}

static void start_workers(int wanted) {
    while (pool.workers < wanted && pool.pauses == 0)
        if (start_worker())
            pool.workers++;
        else
            pool.pauses = CALLS_BETWEEN_STARTS;
    if (pool.pauses > 0) pool.pauses--;
}

/* ---- fork: the child has one thread and starts afresh ---- */

static void before_fork(void) { pthread_mutex_lock(&pool.lock); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&pool.lock); }

/* Whatever another thread was using is left where it lies. */
static void after_fork_in_child(void) {
    pool.fork_generation++;
    pool.workers = pool.pauses = 0;
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.left, NULL);
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.owner_waits, false);
    atomic_store(&pool.computing, 0);
    atomic_store(&pool.door, 0);
    atomic_store(&pool.owned, false);
    scratch_forget_borrowed();
    pthread_mutex_unlock(&pool.lock);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

/* ---- the caller ---- */

static int seats_for(int64_t count, int max_threads) {
    int threads = atomic_load(&pool.limit);
    if (max_threads > 0 && max_threads < threads) threads = max_threads;
    if (count < threads) threads = (int)count;
    return threads - 1 < MAX_WORKERS ? threads - 1 : MAX_WORKERS;
}

static void invite_workers(struct run *run, int wanted) {
    if (wanted <= 0 || atomic_exchange(&pool.owned, true)) return;
    start_workers(wanted);
    run->seats = wanted;
    pool.run = run;
    atomic_store(&pool.door, (uint64_t)wanted << 32);
    int spare = atomic_load(&pool.limit) - atomic_load(&pool.computing);
    wake_workers(wanted < spare ? wanted : spare);
}

/* By the wall clock, which static initialisers give; a step of it during these
 * 10 ms delays a poll, never the end of the run. */
static void wait_for_leavers(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += POLL_NS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.owner_waits, true);
    if (!nobody_inside()) pthread_cond_timedwait(&pool.left, &pool.lock, &until);
    atomic_store(&pool.owner_waits, false);
    pthread_mutex_unlock(&pool.lock);
}

static void dismiss_workers(struct run *run) {
    close_door();
    bool gone = spin_until(nobody_inside);
    while (!gone && !lost_in_fork(run)) {
        wait_for_leavers();
        gone = nobody_inside();
        if (!gone) poll_caller(run);
    }
}

/* Gives back all that the run holds.  In a child forked by the poll it holds nothing. */
static void release(struct run *run) {
    if (run->seats > 0 && !lost_in_fork(run)) dismiss_workers(run);
    if (run->fork_generation != pool.fork_generation) return;
    if (run->seats > 0) atomic_store(&pool.owned, false);
    scratch_return(run->scratch, &run->own_scratch);
    atomic_fetch_sub(&pool.computing, 1);
    if (seat_free()) wake_workers(1);
}

static void lead(struct run *run, int helpers) {
    void *scratch = run->scratch->data; /* also where the poll forked, and the block is no longer ours to ask */
    struct gqa_job job = {.run = run, .is_caller = true};
    if (run->poll.stop != NULL) run->next_poll_ns = now_ns(poll_clock) + POLL_NS;
    invite_workers(run, helpers);
    while (run_next_task(&job, scratch)) continue;
}

enum gqa_status gqa_pool_run(gqa_task *task, const void *context, int64_t count, size_t scratch_bytes, int max_threads,
                             struct gqa_poll poll) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    struct run run = {.task = task,
                      .context = context,
                      .count = count,
                      .poll = poll,
                      .scratch_bytes = scratch_bytes,
                      .fork_generation = pool.fork_generation};
    run.scratch = scratch_borrow(&run.own_scratch);
    atomic_fetch_add(&pool.computing, 1);
    bool ready = scratch_reserve(run.scratch, scratch_bytes);
    if (ready) lead(&run, seats_for(count, max_threads));
    release(&run);
    if (!ready) return GQA_NO_MEMORY;
    return atomic_load(&run.stopped) ? GQA_INTERRUPTED : GQA_OK;
}

int gqa_get_num_threads(void) { return atomic_load(&pool.limit); }

void gqa_set_num_threads(int count) { atomic_store(&pool.limit, count < 1 ? 1 : count); }
