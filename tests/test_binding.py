"""The extension module's manners towards Python: signals, the GIL, several interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import gqa_ext
from gqa_ext import scaled_dot_product_attention

ROWS = np.ones((8, 16384, 64), np.float32)  # some seconds of work
FEW = np.ones((2, 3, 4))


@pytest.fixture
def threads() -> Iterator[None]:
    before = gqa_ext.get_num_threads()
    yield
    gqa_ext.set_num_threads(before)


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
@pytest.mark.parametrize("count", [1, 2])
def test_a_raising_signal_handler_ends_the_call_and_the_next_one_works(count: int) -> None:
    def stop(number: int, frame: object) -> None:
        raise Interrupted

    gqa_ext.set_num_threads(count)
    former = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(Interrupted):
            scaled_dot_product_attention(ROWS, ROWS, ROWS)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, former)
    assert scaled_dot_product_attention(FEW, FEW, FEW).sum() == FEW.sum()


def test_a_silent_signal_handler_runs_during_the_call() -> None:
    seen: list[float] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(time.monotonic()))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    rows = ROWS[:, :6000]
    try:
        timer.start()
        out = scaled_dot_product_attention(rows, rows, rows)
        end = time.monotonic()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, former)
    assert seen
    assert seen[0] < end
    np.testing.assert_allclose(out, 1, rtol=1e-5)


def test_other_threads_run_during_a_call() -> None:
    ticks: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks.append(len(ticks))
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    rows = ROWS[:, :4000]
    counter.start()
    started = len(ticks)
    scaled_dot_product_attention(rows, rows, rows)
    ended = len(ticks)
    done.set()
    counter.join()
    assert ended - started > 3


SUBINTERPRETERS = """
import sys
{first}
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
try:
    import gqa_ext
    print("computed", gqa_ext.scaled_dot_product_attention([[1.0]], [[1.0]], [[1.0]]))
except ImportError as error:
    print("refused")
'''
for _ in range(3):
    name = interpreters.create()
    interpreters.run_string(name, code)
    interpreters.destroy(name)
{last}
print("alive")
"""


def test_several_interpreters_compute_or_are_refused_and_nothing_crashes() -> None:
    """NumPy from 2.3 loads in one interpreter of a process only, and says so with an ImportError."""
    first = "import numpy as np, gqa_ext"
    last = "x = np.ones((2, 3, 4)); assert gqa_ext.scaled_dot_product_attention(x, x, x).sum() == 24"
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + SUBINTERPRETERS.format(first=first, last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("alive")
