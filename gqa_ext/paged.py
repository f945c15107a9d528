"""Attention over keys and values in blocks, as vLLM's PagedAttention keeps them (arXiv:2309.06180).

:func:`paged_attention` takes the caller's blocks; :class:`PagedKVCache` owns blocks and shares them among sequences.
"""

import copy
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _core
from ._arguments import as_array, as_index, as_int
from ._blocks import Blocks, Sequence, block_table
from ._cache_arguments import as_cache_dtype, as_counts, as_rows, make_store
from ._cached import Cached, attend_cached
from ._checks import check_dtype, check_same_precision
from ._messages import Array, count, fail, fits, kind, shapes
from ._rules import as_integers

_WHICH = "pass what new_sequence or fork gave"


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
    if lengths.shape != table.shape[:1]:
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
        self._blocks = Blocks(self.num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._next = 0

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence has."""
        return self._blocks.free

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
        return _lengths_of(self._find("PagedKVCache.lengths", ids))

    def new_sequence(self) -> int:
        """An empty sequence; what it gives is its id."""
        return self._add(Sequence())

    def fork(self, id: int) -> int:
        """A new sequence with the same tokens, in the same blocks. KeyError: there is no such sequence."""
        parent = self._find_one("PagedKVCache.fork", id)
        child = parent.fork()
        with self._all_or_nothing():
            for block in child.blocks():
                self._blocks.share(block)
            return self._add(child)

    def free(self, id: int) -> None:
        """Forget a sequence and give back the blocks that no other has. KeyError: there is no such sequence."""
        sequence = self._find_one("PagedKVCache.free", id)
        with self._all_or_nothing():
            del self._sequences[int(id)]
            for block in reversed(sequence.blocks()):
                self._blocks.release(block)

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
        ids = _as_ids(call, ids)
        sequences = self._find(call, ids)
        if len(set(sequences)) < len(sequences):
            came = f"ids is {ids}"
            fail(ValueError, call, came, "each sequence once was wanted", "append in two calls")
        new = [as_rows(call, name, rows, len(sequences), self.num_kv_heads, self.head_dim)
               for name, rows in (("key", key), ("value", value))]  # fmt: skip
        for name, array in zip(("key", "value"), new, strict=True):
            check_dtype(name, array, call)
        if new[0].shape != new[1].shape:
            wanted = f"one shape was wanted ({shapes(key=new[0], value=new[1])})"
            fail(ValueError, call, "value differs from key", wanted, "pass the rows of both")
        counts = as_counts(call, lengths, len(sequences), new[0].shape[2])
        with self._all_or_nothing(sequences):
            self._take_blocks(call, sequences, counts.tolist())
            table, before = block_table(sequences), _lengths_of(sequences)
            _core.cache_append(*self._stores(), table, new[0], new[1], before, counts)
            for sequence, more in zip(sequences, counts.tolist(), strict=True):
                sequence.length += more

    def attend(self, ids: int | Iterable[int], query: ArrayLike, *, is_causal: bool = True, **rules: Any) -> Any:
        """Attention of the query rows (len(ids), Hq, S, head_dim) of these sequences to all that they have.

        As :meth:`gqa_ext.KVCache.attend`; lengths may differ, and an id may be given more than once. Raises KeyError
        for an id that is not there.
        """
        call = "PagedKVCache.attend"
        sequences = self._find(call, ids)
        query = as_array(call, "query", query)
        if query.ndim < 4 or query.shape[-4] != len(sequences):
            wanted = f"({len(sequences)}, heads, rows, {self.head_dim}) was wanted, a query for each id"
            fail(ValueError, call, f"query has shape {query.shape}", wanted, "give each sequence its rows")
        lengths = _lengths_of(sequences)
        cached = Cached(*self._stores(), block_table(sequences), lengths, max(lengths.tolist(), default=0))
        return attend_cached(call, cached, query, is_causal, rules)

    def __copy__(self) -> "PagedKVCache":
        """As deepcopy: two caches over the same blocks would give them away twice."""
        return copy.deepcopy(self)

    # ---- blocks ----

    def _make_blocks(self) -> tuple[Array, Array | None]:
        """Blocks (N, Hkv, rows, D), where a head's rows of the next block follow at once: a long stream to read."""
        sizes = {name: getattr(self, name) for name in ("num_kv_heads", "num_blocks", "block_size", "head_dim")}
        rows, scales = make_store("PagedKVCache", tuple(sizes.values()), self.dtype, **sizes)
        return rows.swapaxes(0, 1), None if scales is None else scales.swapaxes(0, 1)

    def _stores(self) -> tuple[Array, Array, Array | None, Array | None]:
        return self._keys, self._values, self._key_scales, self._value_scales

    def _arrays(self) -> list[Array]:
        return [array for array in self._stores() if array is not None]

    @contextmanager
    def _all_or_nothing(self, sequences: Iterable[Sequence] = ()) -> Iterator[None]:
        """Where something is raised, Ctrl-C among it, these are as they were, and blocks are counted anew."""
        states = [(sequence, sequence.length, sequence.held, sequence.last()) for sequence in sequences]
        try:
            yield
        except BaseException:
            for sequence, *state in states:
                sequence.restore(*state)
            self._blocks.recount(self._sequences.values())
            raise

    def _add(self, sequence: Sequence) -> int:
        self._next += 1
        self._sequences[self._next - 1] = sequence
        return self._next - 1

    def _find(self, call: str, ids: Any) -> list[Sequence]:
        found = []
        for number in _as_ids(call, ids):
            if number not in self._sequences:
                what = "was freed" if 0 <= number < self._next else "was never given"
                wanted = "the id of a sequence in this cache was wanted"
                fail(KeyError, call, f"sequence {number} {what}", wanted, _WHICH)
            found.append(self._sequences[number])
        return found

    def _find_one(self, call: str, id: Any) -> Sequence:
        return self._find(call, [as_index(call, "id", id, _WHICH)])[0]

    def _take_blocks(self, call: str, sequences: list[Sequence], counts: list[int]) -> None:
        """Room for so many more rows in blocks that nobody else has; all of it or none."""
        shared, wanted = [], []
        taken: dict[int, int] = {}  # copies made of each block, as the last one that has it keeps it
        for sequence, more in zip(sequences, counts, strict=True):
            wanted.append(-(-(sequence.length + more) // self.block_size) - sequence.held)
            if more and sequence.length % self.block_size:
                block = sequence.last()
                if self._blocks.users[block] - taken.get(block, 0) > 1:
                    taken[block] = taken.get(block, 0) + 1
                    shared.append(sequence)
        if sum(wanted) + len(shared) > self._blocks.free:
            need = count(sum(wanted) + len(shared), "more block")
            came = f"{count(sum(counts), 'new row')} need {need} of {self.block_size}"
            there = f"{self._blocks.free} of {self.num_blocks} are free"
            fail(MemoryError, call, came, there, "free a sequence, or make the cache with more blocks")
        for sequence in shared:
            self._unshare(sequence)
        for sequence, more in zip(sequences, wanted, strict=True):
            for _ in range(more):
                sequence.push(self._blocks.take(sequence.last()))

    def _unshare(self, sequence: Sequence) -> None:
        """A copy of the last block, which others have too."""
        theirs, mine = sequence.last(), self._blocks.take(-1)
        for array in self._arrays():
            array[mine] = array[theirs]
        sequence.replace_last(mine)
        self._blocks.release(theirs)


def _lengths_of(sequences: list[Sequence]) -> Array:
    return np.array([sequence.length for sequence in sequences], np.int64)


def _as_ids(call: str, ids: Any) -> list[int]:
    """One id or several."""
    if type(ids) is list and set(map(type, ids)) == {int}:  # as in each step of decoding
        return ids
    odd = isinstance(ids, (str, bytes, bool, np.bool_))
    if not odd:
        with suppress(TypeError):
            return [operator.index(ids)]
    if odd or not isinstance(ids, Iterable):
        fail(TypeError, call, f"ids is {kind(ids)}", "the id of a sequence, or several, was wanted", _WHICH)
    return [as_index(call, "ids", number, _WHICH) for number in ids]
