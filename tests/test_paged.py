"""paged_attention over the caller's blocks, and PagedKVCache, which owns some."""

from __future__ import annotations

import tracemalloc
from typing import Any, NoReturn

import numpy as np
import pytest
from caches import agrees, dense, rows, same, scattered
from numpy.typing import NDArray
from test_guard import guarded

from gqa_ext import KVCache, PagedKVCache, get_alibi_slopes, paged_attention, varlen_attention

Array = NDArray[Any]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("block", [1, 3, 16, 48, 100, 2100])
def test_same_bits_dense_paged_and_packed(block: int, dtype: str, isa: str) -> None:
    """Blocks of any size in any order, ragged, over several tiles and spans; few rows and many."""
    lengths = [2100, 1, 130, 0]
    key, value = rows(1, 4, 2, 2100, 24, dtype=dtype), rows(2, 4, 2, 2100, 17, dtype=dtype)
    keys, values, table = scattered(key, value, lengths, block)
    for seq_q in (1, 40):
        query = rows(0, 4, 4, seq_q, 24, dtype=dtype)
        rules: dict[str, Any] = {"is_causal": True, "query_lengths": np.minimum(seq_q, lengths)}
        got = paged_attention(query, keys, values, table, lengths, return_lse=True, **rules)
        wanted = dense(query, key, value, kv_lengths=lengths, return_lse=True, **rules)
        for a, b in zip(got, wanted, strict=True):
            same(a, b)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    packed = [np.concatenate([x[b, :, :n].swapaxes(0, 1) for b, n in enumerate(lengths)]) for x in (key, value)]
    query = rows(0, 4, 4, 1, 24, dtype=dtype)
    flat = varlen_attention(query[:, :, 0], *packed, np.arange(5), starts)
    same(paged_attention(query, keys, values, table, lengths)[:, :, 0], flat)


@pytest.mark.parametrize("seq_q", [1, 30])
def test_against_the_oracle_with_rules(seq_q: int, isa: str) -> None:
    lengths = [150, 40]
    query, key, value = rows(0, 2, 4, seq_q, 12), rows(1, 2, 2, 160, 12), rows(2, 2, 2, 160, 12)
    keys, values, table = scattered(key, value, lengths, 16)
    wide = [np.pad(x, ((0, 0), (0, 0), (0, 16), (0, 0))) for x in (key, value)]
    mask = np.random.default_rng(0).random((2, 1, seq_q, 176)) < 0.8
    for rules in (
        {"window": (30, 2)}, {"alibi_slopes": get_alibi_slopes(4), "is_causal": True}, {"sinks": np.ones(4)},
        {"attn_mask": mask}, {"softcap": 1.5, "scale": 0.4}, {"key_positions": np.arange(176) - 3},
    ):  # fmt: skip
        got = paged_attention(query, keys, values, table, lengths, return_lse=True, **rules)
        agrees(got, query, *wide, isa, kv_lengths=lengths, **rules)


def test_blocks_of_any_layout() -> None:
    """Strided, of the other byte order, shared among sequences; read in place and flush against forbidden pages."""
    lengths = [40, 40]
    query, key, value = rows(0, 2, 4, 1, 8), rows(1, 1, 2, 40, 8), rows(2, 1, 2, 40, 8)
    keys, values, table = scattered(key, value, [40], 7)
    table = np.concatenate([table, table]).astype(np.int32)
    wanted = dense(query, *(np.concatenate([x, x]) for x in (key, value)))
    same(paged_attention(query, keys, values, table, lengths), wanted)
    same(paged_attention(query, keys, values, table[:, ::-1].copy()[:, ::-1], np.uint8(40)), wanted)
    same(paged_attention(query, keys.astype(">f4"), values, table, lengths), wanted)
    turned = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (keys, values)]
    same(paged_attention(query, *turned, table, lengths), wanted)
    last = [x[table[0, 5]] for x in (keys, values)]  # the block that is not full: its rows past the end do not exist
    for place in ("end", "start"):
        beside = [guarded(np.concatenate([x, y[None]]), place) for x, y in zip((keys, values), last, strict=True)]
        same(paged_attention(query, *beside, table, lengths), wanted)
    cut = [guarded(x[:, :, :5], "end") for x in scattered(key, value, [40], 5)[:2]]
    same(paged_attention(query, *cut, np.repeat(scattered(key, value, [40], 5)[2], 2, 0), lengths), wanted)


BLOCKS = np.ones((6, 2, 4, 8), np.float32)
QUERY = np.ones((2, 4, 1, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_table": [[0, 6], [1, 2]]}, ValueError, r"block_table\[0, 1\] is 6; a block from 0 to 5 was wanted"),
        ({"block_table": [[0, 1], [-1, 2]]}, ValueError, r"block_table\[1, 0\] is -1"),
        ({"kv_lengths": [5, 9]}, ValueError, r"kv_lengths\[1\] is 9; from 0 to the number of keys in its blocks, 8"),
        ({"kv_lengths": [-1, 0]}, ValueError, r"kv_lengths\[0\] is -1"),
        ({"kv_lengths": [1, 2, 3]}, ValueError, "kv_lengths has shape"),
        ({"kv_lengths": [1.0, 2.0]}, TypeError, "integers"),
        ({"block_table": [0, 1]}, ValueError, "block_table has shape"),
        ({"block_table": [[0.0, 1.0]] * 2}, TypeError, "integers"),
        ({"key_blocks": BLOCKS[0]}, ValueError, "key_blocks has shape"),
        ({"key_blocks": BLOCKS.astype(np.int8)}, TypeError, "key_blocks has dtype int8"),
        ({"value_blocks": BLOCKS[:5]}, ValueError, "value_blocks differ"),
        ({"query": QUERY[:, :3]}, ValueError, "query heads must be a multiple"),
        ({"query": QUERY[..., :7]}, ValueError, "head_dim"),
        ({"query": np.ones((3, 4, 1, 8), np.float32)}, ValueError, "batch dimensions"),
        ({"query": QUERY.astype(np.float64)}, TypeError, "float16, bfloat16 or float32 was wanted, as the cache"),
        ({"key_blocks": BLOCKS.astype(np.float64)}, TypeError, "key_blocks is float64, value_blocks is float32; "
         r"float64 goes only with float64: pass value_blocks\.astype\(np\.float64\), or both as float32"),
        ({"key_blocks": BLOCKS.astype(np.float64), "value_blocks": BLOCKS.astype(np.float64)}, TypeError,
         r"query has dtype float32; float64 was wanted, as the cache holds float64: pass query\.astype\(np\.float64\)"),
        ({"scale": 1e40}, ValueError, r"scale is 1e\+40; 0 or a size from .*: multiply query"),
        ({"causal_alignment": "lower_right"}, TypeError, "causal_alignment"),
        ({"nonsense": 3}, TypeError, "nonsense is given; known are attn_mask, .*: leave nonsense out"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"query": QUERY, "key_blocks": BLOCKS, "value_blocks": BLOCKS, "block_table": [[0, 1], [2, 3]],
                 "kv_lengths": [5, 8]}  # fmt: skip
    paged_attention(**arguments)
    with pytest.raises(error, match=words) as caught:
        paged_attention(**{**arguments, **change})
    assert str(caught.value).startswith("paged_attention()")


# ---- PagedKVCache ----


class Twin:
    """A PagedKVCache, and for each sequence the keys and values that it should have."""

    def __init__(self, num_blocks: int, block: int, dtype: str = "float32") -> None:
        self.cache = PagedKVCache(num_blocks, block, 2, 8, dtype=dtype)
        self.right: dict[int, list[Array]] = {}
        self.seed = 0

    def new(self) -> int:
        number = self.cache.new_sequence()
        self.right[number] = [np.zeros((2, 0, 8), np.float32)] * 2
        return number

    def fork(self, number: int) -> int:
        other = self.cache.fork(number)
        self.right[other] = self.right[number]
        return other

    def free(self, number: int) -> None:
        self.cache.free(number)
        del self.right[number]

    def append(self, ids: list[int], size: int, lengths: list[int] | None = None) -> None:
        self.seed += 1
        key, value = (rows(self.seed + 1000 * i, len(ids), 2, size, 8) for i in (0, 1))
        self.cache.append(ids, key, value, lengths)
        for b, number in enumerate(ids):
            n = size if lengths is None else lengths[b]
            old = self.right[number]
            self.right[number] = [np.concatenate([x, y[b, :, :n]], 1) for x, y in zip(old, (key, value), strict=True)]

    def check(self) -> None:
        """All sequences in one call, and each as if it were alone."""
        ids = list(self.right)
        query = rows(7, len(ids), 4, 1, 8)
        got = self.cache.attend(ids, query)
        assert self.cache.lengths(ids).tolist() == [self.right[number][0].shape[1] for number in ids]
        for b, number in enumerate(ids):
            same(got[b : b + 1], dense(query[b : b + 1], *(x[None] for x in self.right[number])))


@pytest.mark.parametrize("block", [1, 4, 16])
def test_fork_in_the_middle_of_a_block_then_diverge(block: int) -> None:
    twin = Twin(200, block)
    parent = twin.new()
    twin.append([parent], 10)
    used = 200 - twin.cache.free_blocks
    first, second = twin.fork(parent), twin.fork(parent)
    assert 200 - twin.cache.free_blocks == used  # a fork takes nothing
    twin.check()
    twin.append([first, second], 3)  # both at once
    twin.check()
    twin.append([parent], 1)
    third = twin.fork(first)
    twin.append([third, parent], 9, [2, 9])
    twin.check()
    twin.free(first)
    twin.check()
    twin.append([third], 20)
    twin.check()
    for number in list(twin.right):
        twin.free(number)
    assert twin.cache.free_blocks == 200


def test_any_history_keeps_every_sequence_apart() -> None:
    """Random forks, appends and frees, until blocks run out and after."""
    rng = np.random.default_rng(3)
    twin = Twin(40, 4)
    twin.append([twin.new()], 5)
    refused = 0
    for _ in range(300):
        ids = list(twin.right)
        what = rng.integers(4)
        if what == 0 and len(ids) < 12:
            twin.new() if rng.random() < 0.3 else twin.fork(int(rng.choice(ids)))
        elif what == 1 and len(ids) > 1 and rng.random() < 0.6:
            twin.free(int(rng.choice(ids)))
        else:
            some = [int(x) for x in rng.permutation(ids)[: rng.integers(1, 4)]]
            before, free = twin.cache.lengths(ids), twin.cache.free_blocks
            try:
                twin.append(some, 6, rng.integers(0, 7, len(some)).tolist())
            except MemoryError:
                refused += 1
                assert (twin.cache.lengths(ids) == before).all()
                assert twin.cache.free_blocks == free
        twin.check()
    assert refused > 3
    for number in list(twin.right):
        twin.free(number)
    assert twin.cache.free_blocks == 40


def test_out_of_blocks_changes_nothing() -> None:
    twin = Twin(5, 4)
    a, b = twin.new(), twin.new()
    twin.append([a], 10)
    fork = twin.fork(a)
    twin.append([b], 4)
    # one block is left; the fork needs a copy of a's last one, and b a new one
    with pytest.raises(MemoryError, match="2 new rows need 2 more blocks of 4; 1 of 5 are free: free a sequence"):
        twin.append([fork, b], 1)
    twin.check()
    twin.append([fork], 2)
    twin.check()
    with pytest.raises(MemoryError):
        twin.append([b], 1)
    twin.free(fork)
    twin.append([b], 1)
    twin.check()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_and_mixed_lengths(dtype: str) -> None:
    paged, cache = PagedKVCache(50, 16, 2, 8, dtype=dtype), KVCache(3, 2, 8, capacity=100, dtype=dtype)
    ids = [paged.new_sequence() for _ in range(3)]
    for size, lengths in ((50, [50, 3, 17]), (1, None), (20, [0, 20, 1])):
        new = rows(size, 3, 2, size, 8), rows(size + 1, 3, 2, size, 8)
        paged.append(ids, *new, lengths)
        cache.append(*new, lengths)
    for seq_q in (1, 4):
        query = rows(5, 3, 4, seq_q, 8, dtype=dtype)
        same(paged.attend(ids, query), cache.attend(query))
        got = paged.attend([ids[2], ids[0], ids[2]], query[[2, 0, 2]], window=(3, 0))
        same(got, cache.attend(query, window=(3, 0))[[2, 0, 2]])
    weights = paged.attend(ids, query, return_weights=True)[1]
    assert weights.shape == (3, 4, 4, 51)
    one = paged.new_sequence()
    paged.append(one, *(x[:1] for x in new))
    assert paged.lengths(one).tolist() == [20]
    assert not paged.attend(paged.new_sequence(), query[:1]).any()


@pytest.mark.parametrize("number", [2**50, 10**20])
def test_no_room_for_blocks(number: int) -> None:
    with pytest.raises(MemoryError, match=rf"^PagedKVCache\(\): num_blocks is {number}; an array .* pass a smaller"):
        PagedKVCache(number, 16, 2, 64)


def test_ids() -> None:
    cache = PagedKVCache(3, 4, 1, 8)
    number = cache.new_sequence()
    new = np.ones((1, 1, 2, 8))
    cache.free(number)
    for call in (lambda n: cache.append(n, new, new), lambda n: cache.attend([n], np.ones((1, 1, 1, 8), np.float32)),
                 cache.fork, cache.free):  # fmt: skip
        with pytest.raises(KeyError, match="sequence 0 was freed"):
            call(number)
        with pytest.raises(KeyError, match="sequence 7 was never given"):
            call(7)
        with pytest.raises(KeyError, match="sequence -1 was never given"):
            call(-1)
        with pytest.raises(TypeError, match=r"ids? is '0', a str"):
            call("0")
    again = cache.new_sequence()
    assert again != number
    with pytest.raises(ValueError, match="each sequence once"):
        cache.append([again, again], np.ones((2, 1, 1, 8)), np.ones((2, 1, 1, 8)))
    with pytest.raises(ValueError, match="key has shape"):
        cache.append([again], np.ones((1, 2, 1, 8)), new)
    with pytest.raises(TypeError, match="key has dtype int64"):
        cache.append([again], new.astype(int), new)
    with pytest.raises(ValueError, match="query has shape"):
        cache.attend([again], np.ones((2, 1, 1, 8), np.float32))
    assert cache.lengths(again).tolist() == [0]
    assert cache.free_blocks == 3
    assert repr(cache) == "PagedKVCache(3, 4, 1, 8, dtype='float32', sequences=1, free_blocks=3)"
    assert cache.nbytes == 3 * 4 * 8 * 2 * 4


class ZeroDimensional:
    """An integer that seems to have items, as a tensor of PyTorch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number

    def __iter__(self) -> NoReturn:
        raise TypeError("iteration over a 0-d tensor")


def test_ids_of_any_kind() -> None:
    """One or several, ints or NumPy's, in a list, an array or an iterator: used up once."""
    twin = Twin(20, 4)
    ids = [twin.new() for _ in range(3)]
    twin.append(ids, 5)
    cache, query = twin.cache, rows(0, 3, 4, 1, 8)
    wanted = cache.attend(ids, query)
    for same_ids in (tuple(ids), np.array(ids), iter(ids), map(np.int32, ids), dict.fromkeys(ids)):
        same(cache.attend(same_ids, query), wanted)
    for one in (ids[0], np.int8(ids[0]), np.array(ids[0]), [ids[0]], iter(ids[:1]), ZeroDimensional(ids[0])):
        same(cache.attend(one, query[:1]), wanted[:1])
    assert cache.attend([], query[:0]).shape == (0, 4, 1, 8)
    new = np.ones((2, 2, 1, 8))
    with pytest.raises(ValueError, match=r"ids is \[1, 1\]"):
        cache.append(iter([1, 1]), new, new)
    for bad in (True, [True], [0.0], None, "01", [[0]]):
        with pytest.raises(TypeError, match="ids is"):
            cache.attend(bad, query)
    for bad in ([0], iter([0]), None, 0.0):
        for call in (cache.free, cache.fork):
            with pytest.raises(TypeError, match="id is"):
                call(bad)
    twin.check()
    cache.free(np.int64(ids[1]))
    assert cache.free_blocks == 20 - 4


def test_what_goes_wrong_inside_append_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out, or Ctrl-C come, when blocks have been taken."""
    twin = Twin(9, 4)
    a, b = twin.new(), twin.new()
    twin.append([a, b], 3)
    fork = twin.fork(a)
    with monkeypatch.context() as patch:
        patch.setattr("gqa_ext.paged.block_table", lambda sequences: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            twin.cache.append([a, b], rows(0, 2, 2, 9, 8), rows(1, 2, 2, 9, 8))
    twin.check()
    twin.append([twin.fork(a), fork, b], 2)
    twin.check()
    for number in list(twin.right):
        twin.free(number)
    assert twin.cache.free_blocks == 9


def test_a_short_sequence_beside_a_long_one_stays_small() -> None:
    cache = PagedKVCache(10_100, 1, 1, 1)
    long, *short = (cache.new_sequence() for _ in range(100))
    new = np.ones((1, 1, 10_000, 1))
    cache.append(long, new, new)
    tracemalloc.start()
    cache.append(short, *[np.ones((99, 1, 1, 1))] * 2)
    query = np.ones((100, 1, 1, 1), np.float32)
    for _ in range(2):
        assert (cache.attend([long, *short], query) == 1).all()
    kept, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 500_000  # a table is 8 MB


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": QUERY[:1].astype(np.float64)}, TypeError, "query has dtype float64; float16, bfloat16 or float32 "
         r"was wanted, as the cache holds int8: pass query\.astype\(np\.float32\)"),
        ({"query": QUERY[:1, :3]}, ValueError, "query heads must be a multiple"),
        ({"query_lengths": [7]}, ValueError, r"query_lengths\[0\] is 7; from 0"),
        ({"nonsense": 3}, TypeError, "nonsense is given; known are attn_mask, .*: leave nonsense out"),
        ({"out": np.ones(3, np.float32)}, ValueError, "out has shape"),
    ],
)  # fmt: skip
def test_attend_names_itself(change: dict[str, Any], error: type[Exception], words: str) -> None:
    cache = PagedKVCache(2, 4, 2, 8, dtype="int8")
    number = cache.new_sequence()
    cache.append(number, BLOCKS[:1], BLOCKS[:1])
    with pytest.raises(error, match=words) as caught:
        cache.attend(number, **{"query": QUERY[:1], **change})
    assert str(caught.value).startswith("PagedKVCache.attend()")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [3, 16])
def test_blocks_that_follow_each_other_in_memory(block: int, dtype: str, isa: str) -> None:
    """Head by head, as PagedKVCache lays them: neighbours are read as one run, and never past the last used one."""
    lengths = [300, 41]
    key, value = (rows(i, 2, 2, 300, 8, dtype=dtype) for i in (1, 2))
    keys, values, table = scattered(key, value, lengths, block)
    used = [int(x) for b in (0, 1) for x in table[b, : -(-lengths[b] // block)]]
    used[5:9] = used[8:4:-1]  # here and there they do not
    order = np.array(used + [n for n in range(len(keys)) if n not in used])
    places = np.argsort(order)
    by_head = [np.ascontiguousarray(x[order].swapaxes(0, 1)).swapaxes(0, 1) for x in (keys, values)]
    moved = np.where(table >= 0, places[np.maximum(table, 0)], table)
    for seq_q in (1, 30):
        query = rows(0, 2, 4, seq_q, 8, dtype=dtype)
        wanted = dense(query, key, value, kv_lengths=lengths)
        same(paged_attention(query, *by_head, moved, lengths), wanted)
        cut = moved[:, : -(-300 // block)]
        same(paged_attention(query, *by_head, cut, lengths), wanted)
