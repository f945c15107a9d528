"""A cache of keys and values that decoding appends to and attends over.

C writes new rows in place and finds each key again; here are lengths, and what is said when something does not fit.
"""

import math
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _core
from ._arguments import as_array, as_dtype, as_flag, as_int
from ._cached import Cached, attend_cached
from ._messages import Array, count, fail, fits, native, shapes
from ._rules import as_integers, as_window

DTYPES = ("float32", "float16", "bfloat16", "int8")


def as_cache_dtype(call: str, thing: Any) -> np.dtype[Any]:
    """One of the types that a cache can hold."""
    dtype = native(as_dtype(call, "dtype", thing))
    if dtype.name not in DTYPES:
        wanted = f"one of {', '.join(DTYPES)} was wanted"
        fail(TypeError, call, f"dtype is {dtype}", wanted, 'pass dtype="float32"; what is appended is cast to it')
    return dtype


def make_store(call: str, came: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
    """Rows (..., D), and their scales if the dtype needs them; ``came`` names the argument that makes them so many."""
    try:
        return np.zeros(shape, dtype), np.zeros(shape[:-1], np.float32) if dtype == np.int8 else None
    except (MemoryError, ValueError, OverflowError):  # the latter two beyond what can be addressed
        wanted = f"an array {shape} of {math.prod(shape) * dtype.itemsize:,} bytes was wanted, and memory has no room"
        fail(MemoryError, call, came, wanted, "pass a smaller number")


def as_rows(call: str, name: str, thing: Any, batch: int, num_heads: int, width: int) -> Array:
    """New rows (B, Hkv, S, D); leading dimensions broadcast."""
    array = as_array(call, name, thing)
    wanted = (batch, num_heads, array.shape[-2] if array.ndim > 1 else 1, width)
    if array.shape == wanted:
        return array
    if array.ndim < 3 or not fits(array.shape, wanted) or array.shape[-3::2] != wanted[-3::2]:
        text = f"({batch}, {num_heads}, rows, {width}) was wanted"
        fail(ValueError, call, f"{name} has shape {array.shape}", text, "pass it as (batch, heads, rows, head_dim)")
    return np.broadcast_to(array, wanted)


def as_counts(call: str, thing: Any, batch: int, rows: int) -> Array:
    """How many of the new rows each sequence gets; all when None."""
    if thing is None:
        counts = np.empty(batch, np.int64)  # as np.full in half its time, once a token
        counts.fill(rows)
        return counts
    counts = as_integers(call, "lengths", thing)
    if not fits(counts.shape, (batch,)):
        wanted = f"one length for each sequence, ({batch},), was wanted"
        fail(ValueError, call, f"lengths has shape {counts.shape}", wanted, "count the new rows of each sequence")
    if counts.size and not 0 <= counts.min() <= counts.max() <= rows:
        wanted = f"from 0 to {rows}, the rows of key, was wanted"
        fail(ValueError, call, f"lengths is {counts.tolist()}", wanted, "count the new rows of each sequence")
    return np.broadcast_to(counts, (batch,)).copy()


class KVCache:
    """Keys and values of a batch of sequences, appended in place and attended over where they lie.

    Parameters
    ----------
    batch, num_kv_heads, head_dim : int
        Sequences, key/value heads, and the length of a key.
    capacity : int
        Tokens that each sequence has room for. Memory is taken at once; the system gives pages as they are filled.
    dtype : {'float32', 'float16', 'bfloat16', 'int8'}
        What is kept. Appended rows of any float dtype are cast, rounded once. int8 is symmetric with one float32
        scale for each token and head, of keys and of values: x becomes q = rint(x / s) with s = max|x| / 127 (rounded
        up), so that every number of a row is off by at most s / 2, which is max|x| / 254. A row with a NaN or an
        infinity becomes NaN as a whole, for the rows that attend to it and for no other.
    v_head_dim : int, optional
        Length of a value. Default `head_dim`.
    window : int or (int, int or None), optional
        W, or (W - 1, right): a row sees the last W keys up to its own, as Mistral's sliding_window says. Older ones
        are overwritten, in a ring of W slots, and any number of tokens can be appended. A chunk of S > 1 new rows
        makes the ring W - 1 + S slots long, so that its first row finds its keys; never longer than `capacity`.
        A capacity below W is no ring: it fills up as without a window.

    Raises
    ------
    ValueError, TypeError, MemoryError
        A number below 1, another dtype, a window that is none, or more tokens than memory has room for.

    Notes
    -----
    One thread at a time may change a cache; any number may attend while nobody changes it.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cache = KVCache(1, 2, 64, capacity=1000, dtype="float16")
    >>> prompt = rng.standard_normal((3, 1, 2, 5, 64), np.float32)  # queries, keys and values of 5 tokens
    >>> cache.append(prompt[1], prompt[2])
    >>> cache.attend(rng.standard_normal((1, 8, 5, 64), np.float32)).shape  # 8 query heads
    (1, 8, 5, 64)
    >>> cache.append(*rng.standard_normal((2, 1, 2, 1, 64), np.float32))  # and the next token
    >>> cache
    KVCache(1, 2, 64, capacity=1000, dtype='float16', lengths=[6])
    """

    _oldest: Array  # int64 (B,): keys before it have been overwritten

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int,
        dtype: DTypeLike = "float32",
        v_head_dim: int | None = None,
        window: int | tuple[int | None, int | None] | None = None,
    ) -> None:
        call = "KVCache"
        self.batch = as_int(call, "batch", batch, 0)
        self.num_kv_heads = as_int(call, "num_kv_heads", num_kv_heads, 1)
        self.head_dim = as_int(call, "head_dim", head_dim, 1)
        self.v_head_dim = self.head_dim if v_head_dim is None else as_int(call, "v_head_dim", v_head_dim, 1)
        self.capacity = as_int(call, "capacity", capacity, 1)
        self.dtype = as_cache_dtype(call, dtype)
        self.window = _as_width(call, window)
        self._store(call, self.capacity if self.window is None else min(self.window, self.capacity))
        self.reset()

    # ---- what is in it ----

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence so far, int64 (B,), a copy. Those that left a window's ring count."""
        return self._lengths.copy()

    @property
    def keys(self) -> Array:
        """The keys, (B, Hkv, longest, head_dim): a read-only view, of int8 where the cache is (see `key_scales`).

        What lies past the length of a shorter sequence means nothing. With a ring it is a copy of the last
        min(length, window) keys of each sequence, the oldest first, zeros behind the last.
        """
        return self._filled(self._keys)

    @property
    def values(self) -> Array:
        """The values, (B, Hkv, longest, v_head_dim), as `keys`."""
        return self._filled(self._values)

    @property
    def key_scales(self) -> Array | None:
        """float32 (B, Hkv, longest): what rows of an int8 cache are multiplied by; else None."""
        return None if self._key_scales is None else self._filled(self._key_scales)

    @property
    def value_scales(self) -> Array | None:
        """The same for values."""
        return None if self._value_scales is None else self._filled(self._value_scales)

    @property
    def nbytes(self) -> int:
        """Bytes that keys, values and scales take, filled or not."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def frozen(self) -> bool:
        """Whether `append` and `crop` raise: for cross-attention, whose keys are made once. Can be set."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._frozen = as_flag("KVCache.frozen", "frozen", frozen)

    def __repr__(self) -> str:
        extra = "" if self.v_head_dim == self.head_dim else f", v_head_dim={self.v_head_dim}"
        extra += "" if self.window is None else f", window={self.window}"
        extra += f", lengths={self._lengths.tolist()}" + (", frozen" if self._frozen else "")
        sizes = f"{self.batch}, {self.num_kv_heads}, {self.head_dim}, capacity={self.capacity}"
        return f"KVCache({sizes}, dtype={self.dtype.name!r}{extra})"

    # ---- what is done with it ----

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Add new rows behind those of each sequence.

        Parameters
        ----------
        key, value : array_like, (B, Hkv, S, head_dim) and (B, Hkv, S, v_head_dim), any float dtype and strides
            A missing or 1 batch dimension goes to every sequence.
        lengths : array_like of int, broadcasting to (B,), optional
            How many of the S rows each sequence gets, from the first. Default all.

        Raises
        ------
        ValueError
            The cache is full or frozen, or shapes do not fit. Nothing has changed then.
        TypeError
            Arrays of no float dtype.
        """
        call = "KVCache.append"
        if self._frozen:
            fail(ValueError, call, "the cache is frozen", "one that can change was wanted", "set cache.frozen = False")
        key = as_rows(call, "key", key, self.batch, self.num_kv_heads, self.head_dim)
        value = as_rows(call, "value", value, self.batch, self.num_kv_heads, self.v_head_dim)
        rows = key.shape[2]
        if value.shape[2] != rows:
            wanted = f"each key needs its value ({shapes(key=key, value=value)})"
            fail(ValueError, call, f"value has {count(value.shape[2], 'row')} but key has {rows}", wanted, "pass both")
        counts = as_counts(call, lengths, self.batch, rows)
        after = self._lengths + counts
        longest = max(after.tolist(), default=0)
        if self._is_ring:
            self._widen_ring(rows)
        elif longest > self.capacity:
            self._explain_full(call, after)
        _core.cache_append(*self._arrays_or_none(), None, key, value, self._lengths, counts)
        self._set_lengths(after, longest)
        if self._is_ring:
            self._oldest = np.maximum(self._oldest, after - self._slots)

    def attend(self, query: ArrayLike, *, is_causal: bool = True, **rules: Any) -> Any:
        """Attention of the query rows to all that is cached; the last row belongs to the last key.

        Parameters
        ----------
        query : array_like, (B, Hq, S, head_dim), float16, bfloat16 or float32
            Usually the rows whose keys were appended last. Hq is a multiple of Hkv.
        is_causal : bool
            Row i of S sees the keys up to its own, length - S + i. False for cross-attention.
        **rules
            As in :func:`gqa_ext.scaled_dot_product_attention`: attn_mask, scale, window, softcap, alibi_slopes,
            sinks, query_lengths, query_positions, key_positions, dropout_p, rng, return_lse, return_weights, out.
            Keys of masks, positions and weights are those of the longest sequence, Sk = lengths.max().

        Returns
        -------
        ndarray (B, Hq, S, v_head_dim), or a tuple, as there. The same bits as that call with the same keys, cast
        to the cache's dtype.

        Raises
        ------
        ValueError
            Shapes do not fit, or the first rows of a long chunk would see keys that a ring has overwritten.
        TypeError
            A dtype, a causal_alignment or kv_lengths, which a cache knows, or a rule that does not exist.
        """
        if self.window is not None:
            rules = self._with_window(query, rules)
        return attend_cached("KVCache.attend", self._cached, query, is_causal, rules)

    def crop(self, n: ArrayLike) -> None:
        """Forget all but the first n tokens, as after rejected drafts; n is one number or one for each sequence.

        A sequence that is shorter stays as it is. ValueError: n is negative, the cache is frozen, or keys of the
        window before n have been overwritten in the ring.
        """
        call = "KVCache.crop"
        if self._frozen:
            fail(ValueError, call, "the cache is frozen", "one that can change was wanted", "set cache.frozen = False")
        most = as_integers(call, "n", n)
        if not fits(most.shape, (self.batch,)) or (most.size and most.min() < 0):
            wanted = f"a number of tokens, at least 0, or one for each of {self.batch} sequences was wanted"
            fail(ValueError, call, f"n is {most.tolist()}", wanted, "pass how many tokens to keep")
        after = np.minimum(self._lengths, most)
        changed = after < self._lengths
        if self.window is not None and (changed & (self._oldest > np.maximum(0, after - self.window))).any():
            came = f"n is {most.tolist()} for lengths {self._lengths.tolist()}"
            wanted = f"the {self.window} keys before n were wanted, and those before {self._oldest.tolist()} are gone"
            fail(ValueError, call, came, wanted, "append what may be cropped in one call, which makes the ring longer")
        self._set_lengths(after)

    def reset(self) -> None:
        """Empty the cache, and thaw it."""
        self._frozen = False
        self._oldest = np.zeros(self.batch, np.int64)  # the lengths as well: neither is written to
        self._set_lengths(self._oldest, 0)

    def reorder(self, index: ArrayLike) -> None:
        """Sequence b becomes what sequence index[b] was, as beam search wants; any may be taken more than once.

        index : array_like of int, (B,), from 0 to B - 1. ValueError else.
        """
        call = "KVCache.reorder"
        source = as_integers(call, "index", index)
        wanted = f"one sequence from 0 to {self.batch - 1} for each of {self.batch} was wanted"
        if source.shape != (self.batch,):
            fail(ValueError, call, f"index has shape {source.shape}", wanted, f"pass shape ({self.batch},)")
        if source.size and not 0 <= source.min() <= source.max() < self.batch:
            fail(ValueError, call, f"index is {source.tolist()}", wanted, "pass numbers of sequences in this cache")
        moved = np.flatnonzero(source != np.arange(self.batch))
        used = min(self._longest, self._slots)
        for array in self._arrays():
            array[moved, :, :used] = array[source[moved], :, :used]
        self._set_lengths(self._lengths[source])
        self._oldest = self._oldest[source]

    # ---- how it lies ----

    def _store(self, call: str, slots: int) -> None:
        """New arrays of so many slots a sequence."""
        shape, came = (self.batch, self.num_kv_heads, slots), f"capacity is {self.capacity}"
        keys, key_scales = make_store(call, came, (*shape, self.head_dim), self.dtype)
        values, value_scales = make_store(call, came, (*shape, self.v_head_dim), self.dtype)
        self._slots = slots
        self._keys, self._values, self._key_scales, self._value_scales = keys, values, key_scales, value_scales

    def _arrays_or_none(self) -> tuple[Array, Array, Array | None, Array | None]:
        return self._keys, self._values, self._key_scales, self._value_scales

    def _arrays(self) -> list[Array]:
        return [array for array in self._arrays_or_none() if array is not None]

    def _set_lengths(self, lengths: Array, longest: int | None = None) -> None:
        """A new array each time: C may be reading the old one. `longest` is the largest, where that is known."""
        self._lengths = lengths
        self._longest = longest if longest is not None else max(lengths.tolist(), default=0)
        self._cached = Cached(*self._arrays_or_none(), None, lengths, self._longest)

    @property
    def _is_ring(self) -> bool:
        return self.window is not None and self.window <= self.capacity

    def _explain_full(self, call: str, after: Array) -> NoReturn:
        """Says whose length would be more than the capacity."""
        b = int(np.argmax(after))
        came = f"the cache is full: sequence {b} has length {self._lengths[b]} of capacity {self.capacity}"
        wanted = f"room for {after[b] - self._lengths[b]} more was wanted, {after[b]} in all"
        fail(ValueError, call, came, wanted, f"make it with capacity={after[b]} or more, or crop or reset it")

    def _widen_ring(self, rows: int) -> None:
        """Room for a chunk and the window before its first row; keys move to their slots of the longer ring."""
        slots = min(self.capacity, (self.window or 0) - 1 + rows)
        if slots <= self._slots:
            return
        before, old = self._arrays(), self._slots
        self._store("KVCache.append", slots)
        for b, length in enumerate(self._lengths.tolist()):
            kept = np.arange(max(0, length - old), length)
            for source, target in zip(before, self._arrays(), strict=True):
                target[b][:, kept % slots] = source[b][:, kept % old]

    def _filled(self, array: Array) -> Array:
        if not self._is_ring:
            view = array[:, :, : self._longest]
            view.flags.writeable = False
            return view
        width = min(self._longest, self.window or 0)
        result = np.zeros((*array.shape[:2], width, *array.shape[3:]), array.dtype)
        for b, length in enumerate(self._lengths.tolist()):
            last = np.arange(max(0, length - width), length)
            result[b, :, : len(last)] = array[b][:, last % self._slots]
        return result

    def _with_window(self, query: Any, rules: dict[str, Any]) -> dict[str, Any]:
        """The rules with this cache's window, which nobody may widen; refuses rows whose keys are gone."""
        call, left = "KVCache.attend", (self.window or 0) - 1
        asked = (left, None) if rules.get("window") is None else as_window(call, rules["window"])
        if self._is_ring and (asked[0] is None or asked[0] > left):
            wanted = f"at most the cache's own, ({left}, None), was wanted, as older keys are gone"
            fail(ValueError, call, f"window is {rules['window']}", wanted, "leave it out")
        if self._is_ring and rules.get("key_positions") is not None:
            fail(ValueError, call, "key_positions is given", "a ring counts its keys itself", "leave it out")
        if self._is_ring and self._oldest.any():
            self._check_reach(query, rules, left if asked[0] is None else asked[0])
        return rules | {"window": asked}

    def _check_reach(self, query: Any, rules: dict[str, Any], left: int) -> None:
        """The first row of each sequence finds all keys of its window."""
        call, rows = "KVCache.attend", (np.shape(query)[-2:-1] or (1,))[0]
        lengths, positions = rules.get("query_lengths"), rules.get("query_positions")
        first = self._lengths - (rows if lengths is None else as_integers(call, "query_lengths", lengths))
        if positions is not None:
            first = as_integers(call, "query_positions", positions).min(axis=-1, initial=self._longest)
        gone = (first - left < self._oldest) & (self._oldest > 0)
        if gone.any():
            came = f"query has {count(rows, 'row')}, and sequence {int(np.argmax(gone))} has lost keys that they see"
            wanted = f"a ring of {left + rows} slots was wanted, and it has {self._slots}"
            fix = "append and attend in shorter chunks, or make the cache with a larger capacity"
            fail(ValueError, call, came, wanted, fix)


def _as_width(call: str, window: Any) -> int | None:
    """How many keys a row sees; None is all."""
    if window is None:
        return None
    if isinstance(window, (tuple, list)):
        left = as_window(call, window)[0]
        return None if left is None else left + 1
    return as_int(call, "window", window, 1)
