"""KVCache against the float64 oracle and, bit for bit, against the same keys in plain arrays."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from caches import agrees, dense, rows, same
from rules import dtype_of
from test_guard import guarded

import gqa_ext
from gqa_ext import KVCache, PagedKVCache, get_alibi_slopes

DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [(1,) * 9, (9,), (4, 5), (7, 1, 1), (1, 8), (0, 9)])
def test_any_split_of_a_sequence_gives_what_one_call_gives(split: tuple[int, ...], dtype: str, isa: str) -> None:
    query, key, value = rows(0, 2, 6, 9, 20, dtype=dtype), rows(1, 2, 3, 9, 20), rows(2, 2, 3, 9, 12)
    key, value = key.astype(dtype_of(dtype)), value.astype(dtype_of(dtype))
    cache = KVCache(2, 3, 20, capacity=9, dtype=dtype, v_head_dim=12)
    ends = list(itertools.accumulate(split))
    for begin, end in zip([0, *ends], ends, strict=False):
        cache.append(key[:, :, begin:end], value[:, :, begin:end])
        got = cache.attend(query[:, :, begin:end], return_lse=True)
        agrees(got, query[:, :, begin:end], key[:, :, :end], value[:, :, :end], isa, is_causal=True)
    same(cache.keys, key)
    same(cache.values, value)
    assert cache.lengths.tolist() == [9, 9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", [1, 3, 60])
def test_same_bits_as_plain_arrays(seq_q: int, dtype: str, isa: str) -> None:
    """Ragged lengths over several tiles and spans."""
    lengths = [2100, 1, 0, 131]
    query = rows(0, 4, 4, seq_q, 24, dtype=dtype)
    key, value = (rows(i, 4, 2, 2100, 24, dtype=dtype) for i in (1, 2))
    cache = KVCache(4, 2, 24, capacity=2200, dtype=dtype)
    cache.append(key, value, lengths)
    for got, wanted in zip(
        cache.attend(query, return_lse=True, query_lengths=np.minimum(seq_q, lengths)),
        dense(query, key, value, is_causal=True, kv_lengths=lengths, query_lengths=np.minimum(seq_q, lengths),
              return_lse=True), strict=True,
    ):  # fmt: skip
        same(got, wanted)


def test_every_rule_goes_through() -> None:
    query, key, value = rows(0, 2, 4, 3, 16), rows(1, 2, 2, 150, 16), rows(2, 2, 2, 150, 16)
    cache = KVCache(2, 2, 16, capacity=400)
    cache.append(key, value, [150, 77])
    mask = np.random.default_rng(0).random((2, 1, 3, 150)) < 0.7
    for rules in (
        {"attn_mask": mask}, {"attn_mask": np.where(mask, 0.5, -np.inf)}, {"scale": 0.3}, {"window": (20, 0)},
        {"softcap": 2.0}, {"alibi_slopes": get_alibi_slopes(4)}, {"sinks": np.arange(4.0)}, {"query_lengths": [2, 3]},
        {"query_positions": np.array([5, 90, 3])}, {"key_positions": np.arange(150) - 9},
        {"is_causal": False}, {"dropout_p": 0.3, "rng": 4}, {},
    ):  # fmt: skip
        plain = dict(rules)
        if "query_positions" not in rules:
            plain["causal_alignment"] = "lower_right"
        wanted = everything(query, key, value, kv_lengths=[150, 77], **({"is_causal": True} | plain))
        for got, right in zip(cache.attend(query, return_lse=True, return_weights=True, **rules), wanted, strict=True):
            same(got, right)
        if "rng" not in rules and "is_causal" not in rules and "query_positions" not in rules:
            got = cache.attend(query, return_lse=True, **rules)
            agrees(got, query, key, value, is_causal=True, kv_lengths=[150, 77], **rules)
    out = np.empty_like(query)
    assert cache.attend(query, out=out) is out
    same(out, cache.attend(query))


def everything(*arrays: Any, **rules: Any) -> Any:
    return gqa_ext.scaled_dot_product_attention(*arrays, return_lse=True, return_weights=True, **rules)


def test_appended_rows_of_any_kind() -> None:
    """Any float dtype, byte order and strides, cast and rounded once; a batch of one goes to everybody."""
    wide = rows(0, 3, 5, 2, 16, dtype="float64")
    for dtype, kind in itertools.product(DTYPES, ("float64", "float32", ">f4", "float16", "bfloat16")):
        key = wide.astype(dtype_of(kind) if kind != ">f4" else kind).transpose(0, 2, 1, 3)[:, :, ::-1, ::2]
        cache = KVCache(3, 2, 8, capacity=6, dtype=dtype)
        cache.append(key, key[..., ::-1])
        same(cache.keys, np.ascontiguousarray(key.astype(dtype_of(dtype))))
        same(cache.values, np.ascontiguousarray(key[..., ::-1].astype(dtype_of(dtype))))
        cache.append(key[0, :, :1], key[:1, :, :1])
        same(cache.keys[:, :, 5], np.repeat(key[:1, :, 0], 3, 0).astype(dtype_of(dtype)))


def test_nothing_stale_is_read(isa: str) -> None:
    """Slots that a crop gave back hold NaN, as do those past a length; and nothing past the array is touched."""
    query, key, value = rows(0, 2, 4, 2, 16), rows(1, 2, 2, 40, 16), rows(2, 2, 2, 40, 16)
    for place, lengths in itertools.product(("end", "start"), ([40, 40], [17, 33], [40, 1])):
        cache = KVCache(2, 2, 16, capacity=40)
        cache._keys, cache._values = guarded(cache._keys, place), guarded(cache._values, place)
        cache.append(np.full_like(key, np.nan), np.full_like(value, np.inf))
        cache.reset()
        cache.append(key, value, lengths)
        got = cache.attend(query, return_lse=True, query_lengths=np.minimum(2, lengths))
        agrees(got, query, key, value, isa, is_causal=True, kv_lengths=lengths, query_lengths=np.minimum(2, lengths))


def test_full() -> None:
    cache = KVCache(2, 1, 4, capacity=5)
    new = rows(0, 2, 1, 3, 4)
    cache.append(new, new, [3, 2])
    before = cache.keys.copy(), repr(cache)
    with pytest.raises(ValueError, match="sequence 0 has length 3 of capacity 5; room for 3 more was wanted, 6 in all"):
        cache.append(new, new)
    assert (cache.keys.tobytes(), repr(cache)) == (before[0].tobytes(), before[1])
    cache.append(new, new, [2, 3])
    assert cache.lengths.tolist() == [5, 5]
    with pytest.raises(ValueError, match="capacity"):
        cache.append(new[:, :, :1], new[:, :, :1])
    cache.append(new[:, :, :1], new[:, :, :1], 0)


def test_crop_then_append() -> None:
    key, value = rows(1, 2, 2, 30, 8), rows(2, 2, 2, 30, 8)
    query = rows(0, 2, 4, 1, 8)
    cache = KVCache(2, 2, 8, capacity=30)
    cache.append(np.full_like(key[:, :, :25], np.nan), value[:, :, :25])
    cache.crop([0, 3])
    assert cache.lengths.tolist() == [0, 3]
    cache.crop(0)
    cache.append(key[:, :, :20], value[:, :, :20])
    cache.crop([11, 40])  # longer than the sequence: nothing happens
    assert cache.lengths.tolist() == [11, 20]
    cache.append(key[:, :, 20:], value[:, :, 20:], [10, 2])
    wanted_key, wanted_value = key.copy(), value.copy()
    for array, source in ((wanted_key, key), (wanted_value, value)):
        array[0, :, 11:21] = source[0, :, 20:]
    same(cache.attend(query), dense(query, wanted_key, wanted_value, is_causal=True, kv_lengths=[21, 22]))
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    assert cache.keys.shape == (2, 2, 0, 8)
    assert not cache.attend(query).any()


@pytest.mark.parametrize("index", [[2, 2, 0], [0, 1, 2], [1, 1, 1], [2, 0, 1]])
def test_reorder_with_repeats(index: list[int]) -> None:
    key, value, query = rows(1, 3, 2, 12, 8), rows(2, 3, 2, 12, 8), rows(0, 3, 4, 1, 8)
    lengths = np.array([12, 3, 7])
    cache = KVCache(3, 2, 8, capacity=20)
    cache.append(key, value, lengths)
    cache.reorder(index)
    assert cache.lengths.tolist() == lengths[index].tolist()
    same(cache.attend(query), dense(query, key[index], value[index], is_causal=True, kv_lengths=lengths[index]))
    cache.append(query[:, :2], query[:, 2:])  # each goes on alone
    for b in range(3):
        same(cache.keys[b, :, lengths[index][b]], query[b, :2, 0])


def test_frozen_for_cross_attention() -> None:
    key, value, query = rows(1, 1, 2, 12, 8), rows(2, 1, 2, 12, 8), rows(0, 1, 4, 5, 8)
    cache = KVCache(1, 2, 8, capacity=12)
    cache.append(key, value)
    cache.frozen = True
    assert "frozen" in repr(cache)
    same(cache.attend(query, is_causal=False), dense(query, key, value))
    with pytest.raises(ValueError, match="frozen"):
        cache.append(key[:, :, :0], value[:, :, :0])
    with pytest.raises(ValueError, match="frozen"):
        cache.crop(3)
    cache.reset()
    assert not cache.frozen
    cache.append(key, value)


def test_views_and_sizes() -> None:
    cache = KVCache(2, 3, 8, capacity=10, dtype="bfloat16", v_head_dim=4)
    assert cache.nbytes == 2 * 3 * 10 * (8 + 4) * 2
    cache.append(rows(0, 2, 3, 4, 8), rows(0, 2, 3, 4, 4))
    assert cache.keys.shape == (2, 3, 4, 8)
    assert cache.values.shape == (2, 3, 4, 4)
    assert np.shares_memory(cache.keys, cache.keys)
    assert not cache.keys.flags.writeable
    assert cache.key_scales is None
    assert cache.value_scales is None
    lengths = cache.lengths
    lengths[:] = 9
    assert cache.lengths.tolist() == [4, 4]
    assert repr(cache) == "KVCache(2, 3, 8, capacity=10, dtype='bfloat16', v_head_dim=4, lengths=[4, 4])"


def test_memory_does_not_grow() -> None:
    """Thousands of steps: what Python allocates and what the process holds stay as they are."""
    import resource
    import tracemalloc

    cache = KVCache(1, 2, 64, capacity=3000)
    one, query = rows(1, 1, 2, 1, 64), rows(0, 1, 8, 1, 64)

    def steps(count: int) -> None:
        for _ in range(count):
            cache.append(one, one)
            cache.attend(query)

    steps(300)
    tracemalloc.start()
    steps(10)
    python, resident = tracemalloc.get_traced_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(2000)
    assert tracemalloc.get_traced_memory()[0] - python < 5000
    tracemalloc.stop()
    # the cache's own pages, which are given as they are filled, and a little for the tracing
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < cache.nbytes / 1024 + 2048


ROW = np.ones((2, 2, 1, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: c.append(ROW[:, :1], ROW), ValueError, r"key has shape \(2, 1, 1, 8\); \(2, 2, rows, 8\)"),
        (lambda c: c.append(ROW, ROW[..., :4]), ValueError, "value has shape"),
        (lambda c: c.append(ROW[0, 0], ROW), ValueError, "key has shape"),
        (lambda c: c.append(np.ones((2, 2, 3, 8)), ROW), ValueError, "value has 1 row but key has 3"),
        (lambda c: c.append(ROW.astype(int), ROW), TypeError, "key has dtype int64; .*astype"),
        (lambda c: c.append(ROW, ROW, [2, 0]), ValueError, "lengths is"),
        (lambda c: c.append(ROW, ROW, [1, 1, 1]), ValueError, "lengths has shape"),
        (lambda c: c.append(ROW, ROW, [0.5, 1]), TypeError, "integers"),
        (lambda c: c.attend(np.ones((2, 4, 1, 9), np.float32)), ValueError, "query has head_dim 9; 8 was wanted"),
        (lambda c: c.attend(np.ones((2, 3, 1, 8), np.float32)), ValueError, "query heads must be a multiple"),
        (lambda c: c.attend(np.ones((3, 4, 1, 8), np.float32)), ValueError, "batch"),
        (lambda c: c.attend(np.ones((2, 4, 1, 8))), TypeError, "query has dtype float64; float16, bfloat16 or float32 "
         r"was wanted, as the cache holds float32: pass query\.astype\(np\.float32\)"),
        (lambda c: c.attend(ROW.astype(int), scale=1.0), TypeError, "query has dtype int64; float16, bfloat16 or "),
        (lambda c: c.attend(ROW, causal_alignment="lower_right"), TypeError, "causal_alignment"),
        (lambda c: c.attend(ROW, kv_lengths=[1, 1]), TypeError, "knows its own lengths"),
        (lambda c: c.attend(ROW, nonsense=1), TypeError,
         "nonsense is given; known are attn_mask, scale, .*, out: leave nonsense out"),
        (lambda c: c.attend(ROW, attn_mask=np.ones((1, 7), bool)), ValueError, "attn_mask has shape"),
        (lambda c: c.attend(ROW, attn_mask=True), TypeError, "attn_mask is True; an array .*: pass is_causal=True"),
        (lambda c: c.attend(ROW, attn_mask=[[None]]), TypeError, r"Python objects; .*np.asarray\(attn_mask, bool\)"),
        (lambda c: c.attend(ROW, is_causal=1), TypeError, "is_causal is 1"),
        (lambda c: c.attend(ROW, scale=1e40), ValueError, r"scale is 1e\+40; 0 or a size from .*: multiply query"),
        (lambda c: c.attend(ROW, window=(-1, 0)), ValueError, "window"),
        (lambda c: c.attend(ROW, out=np.ones(3, np.float32)), ValueError, "out has shape"),
        (lambda c: c.crop(-1), ValueError, "n is -1"),
        (lambda c: c.crop([1, 2, 3]), ValueError, "n is"),
        (lambda c: c.crop(1.5), TypeError, "integers"),
        (lambda c: c.reorder([0, 2]), ValueError, "from 0 to 1"),
        (lambda c: c.reorder([0]), ValueError, "index has shape"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], words: str) -> None:
    cache = KVCache(2, 2, 8, capacity=8)
    cache.append(ROW, ROW)
    with pytest.raises(error, match=words) as caught:
        call(cache)
    assert str(caught.value).startswith("KVCache.")
    assert cache.lengths.tolist() == [1, 1]


def test_a_result_that_no_memory_holds() -> None:
    cache, query = KVCache(1, 1, 1, capacity=8, v_head_dim=64), np.broadcast_to(np.float16(0), (2**58, 1, 1, 1))
    with pytest.raises(MemoryError, match=r"^KVCache.attend\(\): out would have shape \(288230376151711744, 1"):
        cache.attend(query)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity"), ({"batch": 1.5}, TypeError, "batch"),
        ({"dtype": "float64"}, TypeError, "dtype is float64; one of float32, float16, bfloat16, int8"),
        ({"dtype": "int16"}, TypeError, "int16"), ({"window": 0}, ValueError, "window"),
        ({"window": (-1, 0)}, ValueError, "window"), ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        *(({"capacity": number}, MemoryError, rf"^KVCache\(\): capacity is {number}; an array \(1, 2, {number}, 8\) of "
           ".* bytes was wanted, and memory has no room: pass a smaller capacity") for number in (2**50, 10**20)),
    ],
)  # fmt: skip
def test_constructor_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"batch": 1, "num_kv_heads": 2, "head_dim": 8, "capacity": 4} | change
    with pytest.raises(error, match=words):
        KVCache(**arguments)


def test_rows_of_the_cache_itself() -> None:
    """As NumPy's own assignment: rows that lie where C writes are read first."""
    cache, key = KVCache(1, 1, 2, capacity=8), np.arange(8.0).reshape(1, 1, 4, 2)
    cache.append(key, -key)
    keys, values = cache.keys, cache.values
    cache.crop(2)
    cache.append(keys[:, :, 1:3], values[:, :, 1:3])
    assert (cache.keys[0, 0] == key[0, 0, [0, 1, 1, 2]]).all()
    assert (cache.values[0, 0] == -key[0, 0, [0, 1, 1, 2]]).all()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_is_a_cache_of_its_own(make: Any) -> None:
    new, other = rows(0, 1, 2, 3, 8), rows(1, 1, 2, 3, 8)
    cache = KVCache(1, 2, 8, capacity=9, dtype="int8")
    paged = PagedKVCache(9, 2, 2, 8)
    number = paged.new_sequence()
    cache.append(new, new)
    paged.append(number, new, new)
    twin, paged_twin, query = make(cache), make(paged), rows(2, 1, 4, 1, 8)
    cache.append(new, new)
    paged.append(number, new, new)
    twin.append(other, other)
    paged_twin.append(number, other, other)
    assert not (cache.attend(query) == twin.attend(query)).any()
    same(paged.attend(number, query), dense(query, *[np.concatenate([new, new], 2)] * 2))
    same(paged_twin.attend(number, query), dense(query, *[np.concatenate([new, other], 2)] * 2))
    assert paged.new_sequence() == paged_twin.new_sequence() == number + 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: KVCache(10**12, 2, 8, capacity=4), MemoryError, "batch is 1000000000000; .* pass a smaller batch"),
        (lambda: KVCache(1, 2, 10**14, capacity=4), MemoryError, "head_dim is 10{14}; .* pass a smaller head_dim"),
        (lambda: KVCache(1, 2, 8, capacity=4, v_head_dim=10**14), MemoryError, "v_head_dim is 10{14}; "),
        (lambda: PagedKVCache(4, 10**12, 2, 8), MemoryError, "block_size is 10{12}; "),
        (lambda: KVCache(1, 2, 8, capacity=4, dtype="fp16"), TypeError, '"int8"'),
    ],
)
def test_what_is_too_much(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": np.ones((1, 4, 1, 5), np.float32)}, r"query has head_dim 5; 8 was wanted, as the cache's keys have "
         r"it \(query \(1, 4, 1, 5\)\): pass \(\.\.\., rows, 8\)"),
        ({"query": np.ones((1, 3, 1, 8), np.float32)}, "query has 3 heads; query heads must be a multiple of the 2 key "
         r"heads of the cache \(.*\): pass query with 2, 4 or another"),
        ({"scale": 1e-40}, "multiply query by it in float64, cast that back, and pass scale=1.0"),
    ],
)  # fmt: skip
def test_advice_beside_a_cache_speaks_of_what_is_there(change: dict[str, Any], words: str) -> None:
    """The caller has no key to turn or to widen; 5 keys are no head_dim."""
    cache, new = KVCache(1, 2, 8, capacity=9), np.ones((1, 2, 5, 8), np.float32)
    paged = PagedKVCache(9, 2, 2, 8)
    number = paged.new_sequence()
    cache.append(new, new)
    paged.append(number, new, new)
    arguments = {"query": np.ones((1, 4, 1, 8), np.float32)} | change
    for call in (cache.attend, lambda **more: paged.attend(number, **more)):
        with pytest.raises(ValueError, match=words):
            call(**arguments)
    masked = np.ma.ones((1, 2, 1, 8))
    with pytest.raises(TypeError, match=r"pass key\.filled\(\.\.\.\)$"):
        cache.append(masked, new)
    with pytest.raises(TypeError, match=r"as in lengths\.sum\(-1\)$"):
        cache.append(new, new, [True])
