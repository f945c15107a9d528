"""Attention over keys and values in blocks, as vLLM's PagedAttention keeps them (arXiv:2309.06180).

:func:`paged_attention` takes the caller's blocks; :class:`PagedKVCache` owns blocks and shares them among sequences.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _core
from ._arguments import as_array, as_int
from ._cached import Cached, attend_cached
from ._explain import check_dtype, check_same_precision
from ._messages import Array, count, fail, fits, kind, shapes
from ._rules import as_integers
from .cache import as_cache_dtype, as_counts, as_rows, make_store


def paged_attention(
    query: ArrayLike,
    key_blocks: ArrayLike,
    value_blocks: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: ArrayLike,
    *,
    is_causal: bool = False,
    **rules: Any,
) -> Any:
    """Attention of a batch whose keys and values lie in blocks, in any order and shared or not.

    The same bits as :func:`gqa_ext.scaled_dot_product_attention` with the same keys side by side.

    Parameters
    ----------
    query : array_like, (B, Hq, S, D), float16, bfloat16, float32 or float64
        The last row of a sequence belongs to its last key, always: row i stands at kv_length - S + i.
    key_blocks, value_blocks : array_like, (N, Hkv, rows, D) and (N, Hkv, rows, Dv), any of these dtypes
        N blocks of any number of rows, read in place; float64 goes only with float64.
    block_table : array_like of int, (B, blocks)
        Key j of sequence b is row j % rows of block block_table[b, j // rows]. Entries past a sequence's length
        are never looked at and may hold anything.
    kv_lengths : array_like of int, broadcasting to (B,)
    is_causal : bool
        No row sees a key past its own.
    **rules
        As in :func:`gqa_ext.scaled_dot_product_attention`: attn_mask, scale, window, softcap, alibi_slopes, sinks,
        query_lengths, query_positions, key_positions, dropout_p, rng, return_lse, return_weights, out. Keys of
        masks, positions and weights are the table's slots, Sk = blocks * rows.

    Returns
    -------
    ndarray (B, Hq, S, Dv), or a tuple with the LSE and weights, as there.

    Raises
    ------
    ValueError
        Shapes that do not fit, a length past the table, or a used entry that is no block.
    TypeError
        A dtype, a causal_alignment, or a rule that does not exist.

    Examples
    --------
    >>> blocks = np.ones((10, 2, 16, 64), np.float32)
    >>> query = np.ones((2, 8, 1, 64), np.float32)  # one new row for each of two sequences
    >>> paged_attention(query, blocks, blocks, [[3, 7], [9, -1]], [20, 5]).shape
    (2, 8, 1, 64)
    """
    call = "paged_attention"
    keys, values = as_array(call, "key_blocks", key_blocks), as_array(call, "value_blocks", value_blocks)
    _check_block_arrays(call, keys, values)
    table = as_integers(call, "block_table", block_table)
    if table.ndim != 2:
        came = f"block_table has shape {table.shape}"
        fail(ValueError, call, came, "(batch, blocks) was wanted", "give each sequence a row")
    lengths = as_integers(call, "kv_lengths", kv_lengths)
    if not fits(lengths.shape, table.shape[:1]):
        wanted = f"one length for each row of block_table {table.shape} was wanted"
        fail(ValueError, call, f"kv_lengths has shape {lengths.shape}", wanted, f"pass shape {table.shape[:1]}")
    lengths = np.broadcast_to(lengths, table.shape[:1])
    cached = Cached(keys, values, None, None, table, lengths, table.shape[1] * keys.shape[2])
    return attend_cached(call, cached, query, is_causal, rules)


def _check_block_arrays(call: str, keys: Array, values: Array) -> None:
    """(N, Hkv, rows, D) and (N, Hkv, rows, Dv)."""
    for name, array in (("key_blocks", keys), ("value_blocks", values)):
        check_dtype(name, array, call)
        if array.ndim != 4 or array.shape[2] == 0:
            wanted = "(blocks, heads, rows, head_dim) was wanted, with at least one row"
            fail(ValueError, call, f"{name} has shape {array.shape}", wanted, "pass an array of blocks")
    check_same_precision(call, key_blocks=keys, value_blocks=values)
    if keys.shape[:3] != values.shape[:3]:
        where = shapes(key_blocks=keys, value_blocks=values)
        came, wanted = "value_blocks differ from key_blocks", f"the same blocks, heads and rows were wanted ({where})"
        fail(ValueError, call, came, wanted, "pass the blocks of both")


class PagedKVCache:
    """Blocks of keys and values that sequences take as they grow, and share when one is forked.

    Parameters
    ----------
    num_blocks, block_size : int
        How many blocks there are, and tokens in one; any size.
    num_kv_heads, head_dim : int
    dtype : {'float32', 'float16', 'bfloat16', 'int8'}
        As in :class:`gqa_ext.KVCache`.

    Raises
    ------
    ValueError, TypeError, MemoryError
        A number below 1, another dtype, or more blocks than memory has room for.

    Notes
    -----
    A fork shares all blocks of its parent. The first of them to append to a shared, half full block gets a copy of
    it. A block is free again when the last sequence that has it is freed.

    Examples
    --------
    >>> cache = PagedKVCache(num_blocks=100, block_size=16, num_kv_heads=2, head_dim=64)
    >>> prompt = cache.new_sequence()
    >>> cache.append(prompt, np.ones((1, 2, 20, 64)), np.ones((1, 2, 20, 64)))
    >>> other = cache.fork(prompt)
    >>> ids = [prompt, other]
    >>> cache.append(ids, np.ones((2, 2, 1, 64)), np.ones((2, 2, 1, 64)))
    >>> cache.attend(ids, np.ones((2, 8, 1, 64), np.float32)).shape
    (2, 8, 1, 64)
    >>> cache
    PagedKVCache(100, 16, 2, 64, dtype='float32', sequences=2, free_blocks=97)
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, *, dtype: DTypeLike = "float32"
    ) -> None:
        call = "PagedKVCache"
        self.num_blocks = as_int(call, "num_blocks", num_blocks, 1)
        self.block_size = as_int(call, "block_size", block_size, 1)
        self.num_kv_heads = as_int(call, "num_kv_heads", num_kv_heads, 1)
        self.head_dim = as_int(call, "head_dim", head_dim, 1)
        self.dtype = as_cache_dtype(call, dtype)
        self._keys, self._key_scales = self._make_blocks()
        self._values, self._value_scales = self._make_blocks()
        self._free = _FreeBlocks(self.num_blocks)
        self._users = [0] * self.num_blocks  # sequences that have each block
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence has."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes that all blocks take, used or not."""
        return sum(array.nbytes for array in self._arrays())

    def __repr__(self) -> str:
        sizes = f"{self.num_blocks}, {self.block_size}, {self.num_kv_heads}, {self.head_dim}"
        fill = f"sequences={len(self._sequences)}, free_blocks={self.free_blocks}"
        return f"PagedKVCache({sizes}, dtype={self.dtype.name!r}, {fill})"

    def lengths(self, ids: int | Iterable[int]) -> Array:
        """Tokens of each of these sequences, int64."""
        return np.array([sequence.length for sequence in self._find("PagedKVCache.lengths", ids)], np.int64)

    def new_sequence(self) -> int:
        """An empty sequence; what it gives is its id."""
        return self._add(_Sequence())

    def fork(self, id: int) -> int:
        """A new sequence with the same tokens, in the same blocks. KeyError: there is no such sequence."""
        (parent,) = self._find("PagedKVCache.fork", id)
        for block in parent.blocks:
            self._users[block] += 1
        return self._add(_Sequence(parent.length, list(parent.blocks), parent.row.copy()))

    def free(self, id: int) -> None:
        """Forget a sequence and give back the blocks that no other has. KeyError: there is no such sequence."""
        (sequence,) = self._find("PagedKVCache.free", id)
        for block in reversed(sequence.blocks):
            self._release(block)
        del self._sequences[_as_ids("PagedKVCache.free", id)[0]]

    def append(
        self, ids: int | Iterable[int], key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None
    ) -> None:
        """Add new rows behind those of each of these sequences.

        Parameters
        ----------
        ids : int or sequence of int
            Each at most once.
        key, value : array_like, (len(ids), Hkv, S, head_dim), any float dtype and strides
        lengths : array_like of int, broadcasting to (len(ids),), optional
            How many of the S rows each gets, from the first. Default all.

        Raises
        ------
        MemoryError
            There are not enough free blocks. Nothing has changed then, as with the others.
        KeyError
            An id that new_sequence and fork never gave, or that was freed.
        ValueError, TypeError
            Shapes or dtypes do not fit, or an id is given twice.
        """
        call = "PagedKVCache.append"
        sequences = self._find(call, ids)
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            came = f"ids is {_as_ids(call, ids)}"
            fail(ValueError, call, came, "each sequence once was wanted", "append in two calls")
        new = [as_rows(call, name, rows, len(sequences), self.num_kv_heads, self.head_dim)
               for name, rows in (("key", key), ("value", value))]  # fmt: skip
        for name, array in zip(("key", "value"), new, strict=True):
            check_dtype(name, array, call)
        if new[0].shape != new[1].shape:
            wanted = f"one shape was wanted ({shapes(key=new[0], value=new[1])})"
            fail(ValueError, call, "value differs from key", wanted, "pass the rows of both")
        counts = as_counts(call, lengths, len(sequences), new[0].shape[2])
        self._take_blocks(call, sequences, counts.tolist())
        before = np.array([sequence.length for sequence in sequences], np.int64)
        stores = (self._keys, self._values, self._key_scales, self._value_scales)
        _core.cache_append(*stores, self._table(sequences), new[0], new[1], before, counts)
        for sequence, more in zip(sequences, counts.tolist(), strict=True):
            sequence.length += more

    def attend(self, ids: int | Iterable[int], query: ArrayLike, *, is_causal: bool = True, **rules: Any) -> Any:
        """Attention of the query rows (len(ids), Hq, S, head_dim) of these sequences to all that they have.

        As :meth:`gqa_ext.KVCache.attend`; lengths may differ, and an id may be given more than once. Raises KeyError
        for an id that is not there.
        """
        call = "PagedKVCache.attend"
        sequences = self._find(call, ids)
        rows = as_array(call, "query", query)
        if rows.ndim < 4 or rows.shape[-4] != len(sequences):
            wanted = f"({len(sequences)}, heads, rows, {self.head_dim}) was wanted, a query for each id"
            fail(ValueError, call, f"query has shape {rows.shape}", wanted, "give each sequence its rows")
        lengths = np.array([sequence.length for sequence in sequences], np.int64)
        longest = int(lengths.max(initial=0))
        cached = Cached(self._keys, self._values, self._key_scales, self._value_scales, self._table(sequences), lengths,
                        longest)  # fmt: skip
        return attend_cached(call, cached, rows, is_causal, rules)

    # ---- blocks ----

    def _make_blocks(self) -> tuple[Array, Array | None]:
        """Blocks (N, Hkv, rows, D), where a head's rows of the next block follow at once: a long stream to read."""
        shape = (self.num_kv_heads, self.num_blocks, self.block_size, self.head_dim)
        rows, scales = make_store("PagedKVCache", f"num_blocks is {self.num_blocks}", shape, self.dtype)
        return rows.swapaxes(0, 1), None if scales is None else scales.swapaxes(0, 1)

    def _arrays(self) -> list[Array]:
        stores = (self._keys, self._values, self._key_scales, self._value_scales)
        return [array for array in stores if array is not None]

    def _add(self, sequence: "_Sequence") -> int:
        self._next += 1
        self._sequences[self._next - 1] = sequence
        return self._next - 1

    def _find(self, call: str, ids: Any) -> list["_Sequence"]:
        numbers = _as_ids(call, ids)
        for number in numbers:
            if number not in self._sequences:
                what = "was freed" if 0 <= number < self._next else "was never given"
                wanted = "the id of a sequence in this cache was wanted"
                fail(KeyError, call, f"sequence {number} {what}", wanted, "pass what new_sequence or fork gave")
        return [self._sequences[number] for number in numbers]

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free.give(block)

    def _take_blocks(self, call: str, sequences: list["_Sequence"], counts: list[int]) -> None:
        """Room for so many more rows in blocks that nobody else has; all of it or none."""
        size = self.block_size
        shared, wanted = [], 0
        taken: dict[int, int] = {}  # copies made of each block, as the last one that has it keeps it
        for sequence, more in zip(sequences, counts, strict=True):
            wanted += -(-(sequence.length + more) // size) - len(sequence.blocks)
            if more and sequence.length % size:
                block = sequence.blocks[-1]
                if self._users[block] - taken.get(block, 0) > 1:
                    taken[block] = taken.get(block, 0) + 1
                    shared.append(sequence)
        wanted += len(shared)
        if wanted > len(self._free):
            came = f"{count(sum(counts), 'new row')} need {count(wanted, 'more block')} of {size}"
            there = f"{len(self._free)} of {self.num_blocks} are free"
            fail(MemoryError, call, came, there, "free a sequence, or make the cache with more blocks")
        for sequence in shared:
            self._unshare(sequence)
        for sequence, more in zip(sequences, counts, strict=True):
            while len(sequence.blocks) * size < sequence.length + more:
                sequence.push(self._take(sequence.blocks))

    def _take(self, before: list[int]) -> int:
        block = self._free.take(before[-1] if before else None)
        self._users[block] = 1
        return block

    def _unshare(self, sequence: "_Sequence") -> None:
        """A copy of the last block, which others have too."""
        theirs = sequence.blocks.pop()
        mine = self._take(sequence.blocks)
        for array in self._arrays():
            array[mine] = array[theirs]
        self._release(theirs)
        sequence.push(mine)

    def _table(self, sequences: list["_Sequence"]) -> Array:
        """A new block table (len(sequences), blocks)."""
        width = max((len(sequence.blocks) for sequence in sequences), default=0)
        table = np.zeros((len(sequences), width), np.int64)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.row[: len(sequence.blocks)]
        return table


class _Sequence:
    """A sequence's length and its blocks, also as an array that grows by doubling."""

    def __init__(self, length: int = 0, blocks: list[int] | None = None, row: Array | None = None) -> None:
        self.length = length
        self.blocks = blocks or []
        self.row = np.zeros(8, np.int64) if row is None else row

    def push(self, block: int) -> None:
        if len(self.blocks) == len(self.row):
            self.row = np.concatenate([self.row, np.zeros_like(self.row)])
        self.row[len(self.blocks)] = block
        self.blocks.append(block)


class _FreeBlocks:
    """Blocks that nobody has. A sequence gets the one behind its last, if it can, and begins in the widest gap."""

    def __init__(self, count: int) -> None:
        self._is_free = np.ones(count, bool)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def give(self, block: int) -> None:
        self._is_free[block] = True
        self._count += 1

    def take(self, last: int | None) -> int:
        """There is one."""
        behind = 0 if last is None else last + 1
        block = behind if behind < len(self._is_free) and self._is_free[behind] else self._in_widest_gap()
        self._is_free[block] = False
        self._count -= 1
        return block

    def _in_widest_gap(self) -> int:
        """Its middle, as another sequence may be growing into its start."""
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False)).reshape(-1, 2)
        begin, end = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
        middle: int = (begin + end) // 2
        return middle


def _as_ids(call: str, ids: Any) -> list[int]:
    """One id or several."""
    if isinstance(ids, (int, np.integer)) and not isinstance(ids, bool):
        return [int(ids)]
    if isinstance(ids, (str, bytes, bool)) or not isinstance(ids, Iterable):
        wanted = "the id of a sequence, or several, was wanted"
        fail(TypeError, call, f"ids is {kind(ids)}", wanted, "pass what new_sequence or fork gave")
    return [as_int(call, "ids", number, 0) for number in ids]
