/* test_pool_fork.c: the thread pool in forked children, at exit, and where no thread can be had.
 *
 *   gcc -std=c11 -pthread -Icsrc tests/c/test_pool_fork.c csrc/pool.c csrc/scratch.c -o test_pool_fork && ./test_pool_fork
 *
 * Also meant to run under -fsanitize=thread and -fsanitize=address,undefined. */
#define _DEFAULT_SOURCE /* fork, nanosleep and the like beside C11 */

#include "pool_check.h"

#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* Threads in a forked child are what is tested here. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0"; }

static bool child_computes(void)
{
    gqa_set_num_threads(3);
    for (int i = 0; i < 20; i++)
        if (!counted(30, 3, 1024)) return false;
    return workers_help();
}

static bool child_forks_again(void)
{
    return child_computes() && in_child(child_computes) && child_computes();
}

struct endless {
    atomic_int stop, rounds, failures;
};

static void *run_endlessly(void *arg)
{
    struct endless *endless = arg;
    while (!atomic_load(&endless->stop)) {
        if (!counted(50, 3, 4096)) atomic_fetch_add(&endless->failures, 1);
        atomic_fetch_add(&endless->rounds, 1);
    }
    return NULL;
}

static void test_fork_in_mid_use(void)
{
    struct endless endless = {.stop = 0};
    gqa_set_num_threads(3);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, run_endlessly, &endless);
    wait_for(&endless.rounds, 10); /* threads and scratch are there */
    for (int i = 0; i < 15; i++) {
        check(in_child(i % 5 ? child_computes : child_forks_again), "a forked child computes");
        check(wait_for(&endless.rounds, atomic_load(&endless.rounds) + 1), "the parent goes on");
    }
    atomic_store(&endless.stop, 1);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    check(atomic_load(&endless.failures) == 0, "the parent computes right");
}

static bool fork_once(void *arg)
{
    pid_t *child = arg;
    if (*child < 0) *child = fork();
    return false;
}

static void millisecond_task(const void *context, int64_t index, void *scratch, struct gqa_job *job)
{
    (void)context, (void)index, (void)scratch, (void)job;
    sleep_ms(1);
}

/* A signal handler of Python may fork: the poll returns twice. */
static bool poll_forks(int threads, enum gqa_status wanted_in_child)
{
    pid_t child = -1;
    struct gqa_poll poll = {fork_once, &child};
    enum gqa_status status = gqa_pool_run(millisecond_task, NULL, 40, 64, threads, poll);
    if (child == 0) _exit(status == wanted_in_child && child_computes() ? 0 : 1);
    return child_ends_well(child) && status == GQA_OK;
}

static void test_poll_forks(void)
{
    gqa_set_num_threads(2);
    check(poll_forks(1, GQA_OK), "a call on one thread goes on in parent and child");
    check(poll_forks(2, GQA_INTERRUPTED), "a call that lost its workers is interrupted in the child");
    check(counted(MANY, 2, 64), "the parent's next call");
}

static bool exit_in_mid_use(void)
{
    static struct endless endless;
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_endlessly, &endless) != 0 || !wait_for(&endless.rounds, 3)) return false;
    exit(0);
}

static void *nothing(void *arg) { return arg; }

static bool no_threads_to_have(void)
{
    struct rlimit none = {0, 0};
    bool ok = setrlimit(RLIMIT_NPROC, &none) == 0 && (geteuid() != 0 || setuid(65534) == 0); /* root has no limit */
    pthread_t thread;
    return ok && pthread_create(&thread, NULL, nothing, NULL) != 0;
}

static bool computes_without_threads(void)
{
    gqa_set_num_threads(4);
    for (int i = 0; i < 300 && no_threads_to_have(); i++)
        if (!counted(20, 4, 64)) return false;
    return true;
}

static void test_no_threads_to_have(void)
{
    if (in_child(no_threads_to_have))
        check(in_child(computes_without_threads), "computes alone where no thread can be had");
    else
        printf("skipped: no way to make the system refuse a thread\n");
}

/* Its forked children hang in QEMU itself once the parent has threads. */
static bool in_qemu_user_mode(void)
{
    char name[16] = "";
    return prctl(PR_GET_NAME, name) == 0 && strncmp(name, "qemu-", 5) == 0;
}

static void run_all(void)
{
    /* First: to LeakSanitizer all that a child leaves lying of its parent's workers is a leak. */
    check(in_child(exit_in_mid_use), "exit while a thread computes");
    test_fork_in_mid_use();
    test_poll_forks();
    test_no_threads_to_have();
}

int main(void)
{
    alarm(240); /* a deadlock is a failure, not a wait */
    if (in_qemu_user_mode())
        printf("skipped: QEMU's user mode cannot fork a program that has threads\n");
    else
        run_all();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
