"""Threads as a process meets them: several callers, fork, Ctrl-C, exit, environment, and none to be had.

What could end this process or hang it runs as a script in another one, with a time by which a hang is a hang.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import gqa_ext
from gqa_ext import _threads

HANG = 120  # seconds

# What scripts begin with: a problem for several threads, its right answer, and one that never ends.
COMMON = """
import faulthandler, os, sys, threading, time
import numpy as np
import gqa_ext
from gqa_ext import scaled_dot_product_attention as attend

faulthandler.enable()
rng = np.random.default_rng(0)
query, key = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 200, 32), (2, 2, 200, 32)))
gqa_ext.set_num_threads(1)
right = attend(query, key, key)
gqa_ext.set_num_threads(4)

def works():
    return all((attend(query, key, key) == right).all() for _ in range(5))

def attend_for_hours():
    rows = np.broadcast_to(np.float32(1), (256, 1 << 16, 64))
    attend(rows, rows, rows[..., :1])

def attend_to_keys_without_end():
    rows = np.broadcast_to(np.float32(1), (1, 1 << 50, 64))
    attend(rows[:, :1], rows, rows[..., :1])
"""


def run(script: str, folder: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """COMMON and the script as a program of its own; `before` comes before gqa_ext is imported."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(before) + COMMON + textwrap.dedent(script), encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def succeeds(script: str, folder: Path, before: str = "", **environment: str) -> str:
    done = run(script, folder, before, **environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


# ---- several callers ----


def test_concurrent_callers_get_the_bits_of_one() -> None:
    rng = np.random.default_rng(1)
    problems = [rng.standard_normal((4, 1 + 37 * n, 24), np.float32) for n in range(12)] * 8
    alone = [gqa_ext.scaled_dot_product_attention(x, x, x, is_causal=True) for x in problems]
    with ThreadPoolExecutor(8) as callers:
        together = callers.map(lambda x: gqa_ext.scaled_dot_product_attention(x, x, x, is_causal=True), problems)
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_callers_may_change_the_number_of_threads() -> None:
    before = gqa_ext.get_num_threads()
    x = np.random.default_rng(2).standard_normal((8, 300, 16))
    alone = gqa_ext.scaled_dot_product_attention(x, x, x)
    done = threading.Event()

    def change() -> None:
        while not done.wait(1e-4):
            gqa_ext.set_num_threads(1 + gqa_ext.get_num_threads() % 5)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(50):
            assert gqa_ext.scaled_dot_product_attention(x, x, x).tobytes() == alone.tobytes()
    finally:
        done.set()
        changer.join()
        gqa_ext.set_num_threads(before)


# ---- fork ----

FORKS = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about any fork beside threads

def child_works():
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        os._exit(0 if works() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")


@needs_fork
def test_fork_while_other_threads_compute(tmp_path: Path) -> None:
    script = """
    failures, done = [], threading.Event()

    def keep_computing():
        while not done.is_set():
            if not works():
                failures.append(1)

    others = [threading.Thread(target=keep_computing) for _ in range(2)]
    for thread in others:
        thread.start()
    for _ in range(8):
        assert child_works()
        assert works()
    done.set()
    for thread in others:
        thread.join()
    assert not failures
    """
    succeeds(FORKS + textwrap.dedent(script), tmp_path)


@needs_fork
def test_fork_in_a_signal_handler_during_a_call(tmp_path: Path) -> None:
    """The child has lost the threads that were at its call: it may raise, but not return a wrong answer."""
    script = """
    import signal
    parent, children = os.getpid(), []
    signal.signal(signal.SIGALRM, lambda *_: children or children.append(os.fork()))
    rows = np.ones((8, 6000, 64), np.float32)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        wrong = not np.allclose(attend(rows, rows, rows), 1)
    except Exception:
        wrong = os.getpid() == parent
    if os.getpid() != parent:
        os._exit(1 if wrong or not works() else 0)
    assert children and not wrong and works()
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    """
    succeeds(FORKS + textwrap.dedent(script), tmp_path)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    script = f"""
    import multiprocessing

    def task(number):
        return works() and number

    if __name__ == "__main__":
        if "{method}" in multiprocessing.get_all_start_methods():
            assert works()
            with multiprocessing.get_context("{method}").Pool(2) as processes:
                assert processes.map(task, range(6)) == [True and n for n in range(6)]
            assert works()
    """
    succeeds(script, tmp_path)


# ---- Ctrl-C and exit ----


@pytest.mark.parametrize("call", ["attend_for_hours", "attend_to_keys_without_end"])
@pytest.mark.parametrize("count", [1, 4])
def test_ctrl_c_ends_a_call_of_hours(count: int, call: str, tmp_path: Path) -> None:
    script = f"""
    import signal

    gqa_ext.set_num_threads({count})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        {call}()
    except KeyboardInterrupt:
        assert works()
        print("interrupted")
    """
    assert succeeds(script, tmp_path) == "interrupted"


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.2])
def test_exit_while_daemon_threads_compute(delay: float, tmp_path: Path) -> None:
    script = f"""
    def keep_computing():
        while True:
            attend(query, key, key)

    for target in (keep_computing, keep_computing, attend_for_hours):
        threading.Thread(target=target, daemon=True).start()
    time.sleep({delay})
    print("done")
    """
    assert succeeds(script, tmp_path) == "done"


def test_no_thread_to_be_had(tmp_path: Path) -> None:
    """Root has no limit of processes, so it becomes nobody."""
    script = """
    import resource

    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        threading.Thread(target=print).start()
    except RuntimeError:
        assert works() and gqa_ext.get_num_threads() == 4
        print("works alone")
    """
    if succeeds(script, tmp_path) != "works alone":
        pytest.skip("this system gives threads whatever RLIMIT_NPROC says")


# ---- how many ----


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("GQA_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("gqa", "omp", "count"),
    [("3", "", 3), (" 3 ", "5", 3), ("", "5", 5), ("", "5,2,1", 5), ("2147483647", "", 2**31 - 1)],
)
def test_the_environment_says_how_many(gqa: str, omp: str, count: int, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GQA_NUM_THREADS", gqa)
    environment.setenv("OMP_NUM_THREADS", omp)
    assert _threads.default_num_threads() == count


@pytest.mark.parametrize("bad", ["0", "-2", "two", "1.5", "2147483648", "9" * 5000, "1_0", "٣"])
def test_a_bad_number_is_an_import_error(bad: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GQA_NUM_THREADS", bad)
    with pytest.raises(ImportError, match=f"environment variable GQA_NUM_THREADS is '{bad}'.*unset it"):
        _threads.default_num_threads()


@pytest.mark.parametrize("bad", ["0", "many", "", ",2", "-1", "9" * 5000])
def test_a_bad_omp_number_is_passed_over(bad: str, environment: pytest.MonkeyPatch) -> None:
    usual = _threads.default_num_threads()
    environment.setenv("OMP_NUM_THREADS", bad)
    assert _threads.default_num_threads() == usual >= 1


def test_the_import_reads_the_environment(tmp_path: Path) -> None:
    printing = "from gqa_ext import get_num_threads; print(get_num_threads()); raise SystemExit"
    assert succeeds("", tmp_path, printing, GQA_NUM_THREADS="3") == "3"
    done = run("", tmp_path, GQA_NUM_THREADS="three")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: import gqa_ext: environment variable")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_affinity_says_how_many(tmp_path: Path) -> None:
    before = """
    import os
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    from gqa_ext import get_num_threads
    print(get_num_threads())
    raise SystemExit
    """
    assert succeeds("", tmp_path, before, GQA_NUM_THREADS="", OMP_NUM_THREADS="") == "1"


V1 = {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/a/b", {}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/docker/0123", {"cpu.max": "200000 100000"}, 2),  # a container that sees its own group as the root
        ("5:cpu:/a\n0::/", V1, 2.5),
        ("5:cpu:/a/b\n0::/", V1, 2.5),
        ("5:cpu,cpuacct:/a", {path.replace("cpu/", "cpu,cpuacct/"): text for path, text in V1.items()}, 2.5),
        ("5:cpuset:/a\n4:memory:/a", {path.replace("cpu/", "cpuset/"): text for path, text in V1.items()}, math.inf),
        ("5:cpu:/a", {**V1, "cpu/a/cpu.cfs_quota_us": "-1"}, math.inf),
        ("no such format", {"cpu.max": "garbage"}, math.inf),
        ("0::/a", {"a/cpu.max": "1 0"}, math.inf),
    ],
)
def test_quota_of_control_groups(groups: str, files: dict[str, str], cpus: float, tmp_path: Path) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups + "\n")
    assert _threads.cgroup_cpus(str(tmp_path / "groups"), str(tmp_path)) == cpus


def test_a_quota_is_rounded_up(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(_threads, "cgroup_cpus", lambda: math.inf)
    cpus = _threads.default_num_threads()
    for quota, count in [(0.3, 1), (cpus - 0.5, cpus), (cpus + 0.5, cpus)]:
        environment.setattr(_threads, "cgroup_cpus", lambda quota=quota: quota)
        assert _threads.default_num_threads() == count
