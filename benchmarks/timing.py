"""Interleaved timing: every contender in turn, round after round, so that a slow minute hits all of them.

Called by attention.py, rules.py and contenders that choose between forms. Times are seconds a call; the caller takes
medians. What it guards against: threads of one contender still spinning while the next is timed (`settle`), a cold
first call after that pause (one untimed call when calls are short), and other programs on the machine, which it cannot
stop but measures (`Bystanders`).
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SAMPLE_SECONDS = 0.03
"""A sample repeats short calls for about this long."""

Call = Callable[[int], object]
"""One call of the work; the number says which set of data to use."""


def settle(limit: float = 0.5) -> None:
    """Wait until this process uses no CPU: BLAS, OpenMP and ONNX Runtime threads spin for a while after a call."""
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            return


def seconds_per_call(call: Call, data: Iterator[int], calls: int) -> float:
    """Mean of `calls` calls in a row, after an untimed one if there are several."""
    settle()
    if calls > 1:
        call(next(data))
    begin = time.perf_counter()
    for _ in range(calls):
        call(next(data))
    return (time.perf_counter() - begin) / calls


def best_of(call: Call, tries: int) -> float:
    """The shortest of several calls: enough to choose between forms of one contender."""
    times = []
    for i in range(tries):
        begin = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - begin)
    return min(times)


def round_robin(contenders: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Time every contender once a round; who starts moves on each round.

    All draw data set numbers from one counter, so no call finds the set that the one before it left in the cache.
    """
    data = itertools.count()
    calls = {name: _calls_per_sample(call, data) for name, call in contenders.items()}
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for start in range(rounds):
        for step in range(len(names)):
            name = names[(start + step) % len(names)]
            times[name].append(seconds_per_call(contenders[name], data, calls[name]))
    return times


def _calls_per_sample(call: Call, data: Iterator[int]) -> int:
    call(next(data))
    once = seconds_per_call(call, data, 1)
    several = seconds_per_call(call, data, 10) if once < 0.001 else once
    return max(1, math.ceil(SAMPLE_SECONDS / several))


class Bystanders:
    """Share of the machine's CPU time that other programs used since this object was made."""

    def __init__(self) -> None:
        self._start = self._others(), time.perf_counter()

    def share(self) -> float | None:
        """Between 0 and 1, or None where there is no /proc/stat."""
        others, begin = self._start
        now = self._others()
        if now is None or others is None:
            return None
        return max(0.0, (now - others) / ((time.perf_counter() - begin) * (os.cpu_count() or 1)))

    def report(self, rounds: int) -> None:
        """Print how much they used, where it is known."""
        share = self.share()
        if share is not None:
            print(f"\n{rounds} rounds; other programs used {share:.0%} of the machine meanwhile")

    @staticmethod
    def _others() -> float | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - sum(own[:4])  # with those of child processes that have ended
