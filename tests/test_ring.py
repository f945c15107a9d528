"""KVCache with a window: a ring whose attention equals attention over the last window keys, positions right."""

from __future__ import annotations

import numpy as np
import pytest
from caches import agrees, dense, rows, same

from gqa_ext import KVCache, get_alibi_slopes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 19])
def test_wrapped_at_every_offset(window: int, dtype: str, isa: str) -> None:
    """One token at a time, three times around; ALiBi tells positions apart."""
    steps = 3 * window + 5
    query = rows(0, 1, 4, steps, 12, dtype=dtype)
    key, value = rows(1, 1, 2, steps, 12, dtype=dtype), rows(2, 1, 2, steps, 12, dtype=dtype)
    rules = {"alibi_slopes": get_alibi_slopes(4), "window": (window - 1, None)}
    cache = KVCache(1, 2, 12, capacity=window, dtype=dtype, window=window)
    for i in range(steps):
        cache.append(key[:, :, i : i + 1], value[:, :, i : i + 1])
        got = cache.attend(query[:, :, i : i + 1], alibi_slopes=rules["alibi_slopes"], return_lse=True)
        seen = (query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1])
        agrees(got, *seen, isa, is_causal=True, **rules)
        same(got[0], dense(*seen, is_causal=True, **rules))
        first = max(0, i + 1 - window)
        same(cache.keys, key[:, :, first : i + 1])
    last = slice(steps - window, steps)
    agrees(cache.attend(query[:, :, -1:], return_lse=True), query[:, :, -1:], key[:, :, last], value[:, :, last], isa)
    assert cache.lengths.tolist() == [steps]


@pytest.mark.parametrize("sizes", [(40, 1, 1), (3, 50, 1, 17), (17,) * 5, (1, 2, 3, 4, 60)])
def test_chunks_of_any_size(sizes: tuple[int, ...], isa: str) -> None:
    """The ring grows to what a chunk needs, and no further; every row finds its window."""
    window, total = 16, sum(sizes)
    query, key, value = rows(0, 2, 4, total, 8), rows(1, 2, 2, total, 8), rows(2, 2, 2, total, 8)
    cache = KVCache(2, 2, 8, capacity=1000, window=(window - 1, 0))
    end = 0
    for size in sizes:
        begin, end = end, end + size
        cache.append(key[:, :, begin:end], value[:, :, begin:end])
        got = cache.attend(query[:, :, begin:end], return_lse=True)
        seen = (query[:, :, begin:end], key[:, :, :end], value[:, :, :end])
        agrees(got, *seen, isa, is_causal=True, window=(window - 1, 0))
        same(got[0], dense(*seen, is_causal=True, window=(window - 1, 0)))
    assert cache.nbytes == 2 * 2 * (window - 1 + max(sizes)) * 8 * 2 * 4


@pytest.mark.parametrize("seq_q", [1, 40])
def test_long_rings_and_ragged_lengths(seq_q: int, isa: str) -> None:
    """Several tiles and spans, wrapped, in few rows and in many."""
    lengths, window, total = np.array([5000, 2600, 130]), 2300, 5000
    key, value, query = rows(1, 3, 1, total, 8), rows(2, 3, 1, total, 8), rows(0, 3, 2, seq_q, 8)
    cache = KVCache(3, 1, 8, capacity=window + 100, window=window)
    for begin in range(0, total, 100):
        chunk = slice(begin, begin + 100)
        cache.append(key[:, :, chunk], value[:, :, chunk], np.clip(lengths - begin, 0, 100))
    rules = {"is_causal": True, "kv_lengths": lengths, "window": (window - 1, None)}
    got = cache.attend(query, return_lse=True)
    agrees(got, query, key, value, isa, **rules)
    same(got[0], dense(query, key, value, **rules))


def test_memory_is_freed() -> None:
    """A ring takes the window and no more, however long it goes on."""
    cache = KVCache(1, 2, 8, capacity=4096, window=16)
    assert cache.nbytes == KVCache(1, 2, 8, capacity=16).nbytes
    for _ in range(100):
        cache.append(rows(0, 1, 2, 1, 8), rows(1, 1, 2, 1, 8))
    assert cache.nbytes == KVCache(1, 2, 8, capacity=16).nbytes


def test_a_window_longer_than_the_capacity_fills_up() -> None:
    cache = KVCache(1, 1, 8, capacity=4, window=6)
    cache.append(rows(0, 1, 1, 4, 8), rows(1, 1, 1, 4, 8))
    with pytest.raises(ValueError, match="capacity 4"):
        cache.append(rows(0, 1, 1, 1, 8), rows(1, 1, 1, 1, 8))


def test_a_chunk_past_the_capacity_is_refused_when_its_first_rows_lack_keys() -> None:
    query, key = rows(0, 1, 2, 9, 8), rows(1, 1, 1, 30, 8)
    cache = KVCache(1, 1, 8, capacity=10, window=4)
    cache.append(key[:, :, :20], key[:, :, :20])  # more than the ring holds
    with pytest.raises(ValueError, match=r"ring of 12 slots was wanted, and it has 10: append and attend in shorter"):
        cache.attend(query)
    rules = {"is_causal": True, "window": (3, None)}
    same(cache.attend(query[:, :, :7]), dense(query[:, :, :7], key[:, :, :20], key[:, :, :20], **rules))
    same(cache.attend(query, query_lengths=[7]), dense(query, key[:, :, :20], key[:, :, :20], query_lengths=7, **rules))
    with pytest.raises(ValueError, match="window"):
        cache.attend(query[:, :, :1], window=(4, 0))
    with pytest.raises(ValueError, match="key_positions"):
        cache.attend(query[:, :, :1], key_positions=np.arange(20))
    got = cache.attend(query[:, :, :7], window=(1, 0))
    same(got, dense(query[:, :, :7], key[:, :, :20], key[:, :, :20], is_causal=True, window=(1, 0)))


def test_crop_and_reorder_in_a_ring() -> None:
    """Drafts appended as one chunk may be cropped; keys of the window that are gone may not be missed."""
    query, key, value = rows(0, 2, 2, 1, 8), rows(1, 2, 1, 60, 8), rows(2, 2, 1, 60, 8)
    cache = KVCache(2, 1, 8, capacity=100, window=5)
    for i in range(20):
        cache.append(key[:, :, i : i + 1], value[:, :, i : i + 1], [1, i % 2])
    with pytest.raises(ValueError, match="append what may be cropped in one call"):
        cache.crop(19)
    drafts = slice(20, 27)
    cache.append(key[:, :, drafts], value[:, :, drafts])
    with pytest.raises(ValueError, match="ring"):
        cache.crop([14, 17])
    assert cache.lengths.tolist() == [27, 17]
    cache.crop([21, 11])
    odd = np.arange(1, 20, 2)
    first = [np.concatenate([x[0, :, :21], np.full((1, 9, 8), np.nan, np.float32)], 1) for x in (key, value)]
    second = [np.concatenate([x[1][:, [*odd, 20]], np.full((1, 19, 8), np.nan, np.float32)], 1) for x in (key, value)]
    rules = {"is_causal": True, "window": (4, None)}
    wanted = [np.stack([a, b]) for a, b in zip(first, second, strict=True)]
    same(cache.attend(query), dense(query, *wanted, kv_lengths=[21, 11], **rules))
    cache.reorder([1, 1])
    twice = [np.stack([b, b]) for b in second]
    same(cache.attend(query), dense(query, *twice, kv_lengths=[11, 11], **rules))
    cache.append(key[:, :, 30:31], value[:, :, 30:31])
    for array, new in zip(twice, (key, value), strict=True):
        array[:, :, 11] = new[:, :, 30]
    same(cache.attend(query), dense(query, *twice, kv_lengths=[12, 12], **rules))


def test_bounds_of_a_window_are_both_kept(isa: str) -> None:
    """(left, right), without a ring where left is open; a call may narrow them."""
    key, value, query = rows(1, 2, 1, 6, 8), rows(2, 2, 1, 6, 8), rows(0, 2, 2, 3, 8)
    narrow = dense(query, key, value, window=(1, 0), is_causal=True)
    for window in ((3, 1), (3, 0), (None, 1), (None, 0)):
        cache = KVCache(2, 1, 8, capacity=20, window=window)
        cache.append(key, value)
        got = cache.attend(query, is_causal=False, return_lse=True)
        agrees(got, query, key, value, isa, window=window, query_positions=np.arange(3, 6))
        assert repr(cache) == f"KVCache(2, 1, 8, capacity=20, dtype='float32', window={window}, lengths=[6, 6])"
        same(cache.attend(query, window=(1, 0)), narrow)
        wider = cache.attend(query, is_causal=False, window=(window[0], None), return_lse=True)
        agrees(wider, query, key, value, isa, window=window, query_positions=np.arange(3, 6))


def test_a_sequence_of_a_ring_begins_again() -> None:
    cache = KVCache(2, 1, 8, capacity=64, window=4)
    for t in range(9):
        cache.append(rows(t, 2, 1, 1, 8), rows(t, 2, 1, 1, 8))
    cache.crop([0, 9])
    new = rows(20, 2, 1, 3, 8)
    cache.append(new, new, [3, 0])
    fresh = KVCache(1, 1, 8, capacity=64, window=4)
    fresh.append(new[:1], new[:1])
    query = rows(0, 2, 2, 1, 8)
    same(cache.attend(query)[:1], fresh.attend(query[:1]))
    assert cache.lengths.tolist() == [3, 9]
    cache.crop(0)
    assert cache.lengths.tolist() == [0, 0]
    for _ in range(9):
        cache.append(new[:, :, :1], new[:, :, :1])
    with pytest.raises(ValueError, match="are gone"):
        cache.crop(2)


def test_a_ring_is_as_long_as_it_must_be() -> None:
    cache, new = KVCache(1, 1, 8, capacity=100, window=4), rows(0, 1, 1, 50, 8)
    few = cache.nbytes
    with pytest.raises(TypeError, match=r"^KVCache.append\(\): key has dtype int64"):
        cache.append(new.astype(int), new)
    with pytest.raises(TypeError, match=r"^KVCache.append\(\): value has dtype int64"):
        cache.append(new, new.astype(int))
    cache.append(new, new, 0)
    cache.append(new, new, 1)
    assert cache.nbytes == few
    cache.append(new, new)
    assert cache.nbytes > few
    cache.reset()
    assert cache.nbytes == few
