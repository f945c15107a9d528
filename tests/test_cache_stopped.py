"""Caches whose append was stopped, by Ctrl-C or another signal: all of the call has happened, or nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from caches import rows, same
from numpy.typing import NDArray

from gqa_ext import KVCache, PagedKVCache, _core

Array = NDArray[Any]


def test_a_long_append_stops_for_ctrl_c_and_changes_nothing() -> None:
    cache = KVCache(1, 1, 1, capacity=2**24, dtype="int8")
    new = np.broadcast_to(np.float32(1), (1, 1, 2**24, 1))
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        cache.append(new, new)
    assert cache.lengths.tolist() == [0]
    cache.append(new[:, :, :3], new[:, :, :3])
    np.testing.assert_allclose(cache.attend(np.ones((1, 1, 1, 1), np.float32)), 1, rtol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("window", [None, 40])
def test_ctrl_c_when_rows_have_been_written(
    window: int | None, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python hears of it as C comes back: either all happened or nothing, and the cache says which."""
    cache, twin = (KVCache(1, 1, 8, capacity=100, window=window) for _ in range(2))
    old, new, query = rows(0, 1, 1, 45, 8), rows(1, 1, 1, 5, 8), rows(2, 1, 2, 1, 8)
    for each in (cache, twin):
        each.append(old, old)
    append = _core.cache_append

    def interrupted(*arguments: Any) -> None:
        append(*arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_core, "cache_append", interrupted)
        with pytest.raises(error):
            cache.append(new, new)
    if cache.lengths[0] == 50:
        twin.append(new, new)
    same(cache.attend(query), twin.attend(query))
    assert (cache.keys == twin.keys).all()
    for each in (cache, twin):
        each.append(new, new)
    same(cache.attend(query), twin.attend(query))
    with monkeypatch.context() as patch:
        patch.setattr(_core, "cache_append", lambda *_: [].extend(0))  # as C refuses: nothing is written
        with pytest.raises(TypeError):
            cache.append(new, new)
    same(cache.attend(query), twin.attend(query))
    assert cache.lengths.tolist() == twin.lengths.tolist()


@pytest.mark.parametrize("kind", ["plain", "ring", "paged"])
def test_a_signal_at_any_moment_leaves_a_cache_that_knows_what_it_has(kind: str) -> None:
    """All of a call or nothing, some thousand times; a test of a few microseconds cannot do it once."""
    armed, chance, stops = False, random.Random(0), 0

    def stop(*_: Any) -> None:
        if armed:
            raise TimeoutError

    before, until = signal.signal(signal.SIGALRM, stop), time.monotonic() + 0.7
    try:
        while time.monotonic() < until:
            cache: Any = PagedKVCache(90, 2, 1, 4) if kind == "paged" else KVCache(1, 1, 4, capacity=90, window=8)
            if kind == "plain":
                cache = KVCache(1, 1, 4, capacity=90)
            ids = [cache.new_sequence()] if kind == "paged" else []
            cache.append(*ids, *[numbered(0, 11)] * 2)
            ids = [cache.fork(*ids)] if kind == "paged" else []
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 60e-6))
                cache.append(*ids, *[numbered(11, 16)] * 2)
            except TimeoutError:
                stops += 1
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            length = int((cache.lengths(*ids) if kind == "paged" else cache.lengths)[0])
            assert length in (11, 16)
            weights = np.full((1, 1, 1, 4), 0, np.float32)  # every key counts alike: the mean of all that are seen
            seen = range(max(0, length - 8), length) if kind == "ring" else range(length)
            np.testing.assert_allclose(cache.attend(*ids, weights)[0, 0, 0, 0], np.mean(seen), rtol=1e-6)
            if kind == "paged":
                assert cache.free_blocks == 90 - 6 - (3 if length == 16 else 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stops > 20


def numbered(first: int, end: int) -> Array:
    """Rows that say which they are."""
    return np.repeat(np.arange(first, end, dtype=np.float32), 4).reshape(1, 1, -1, 4)
