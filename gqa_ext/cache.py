"""A cache of keys and values that decoding appends to and attends over.

C writes new rows in place and finds each key again; here are lengths, and what is said when something does not fit.
"""

import copy
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _core
from ._arguments import as_flag, as_int
from ._cache_arguments import as_cache_dtype, as_counts, as_rows, make_store
from ._cached import Cached, attend_cached
from ._checks import check_dtype
from ._messages import Array, count, fail, fits, shapes
from ._rules import as_integers, as_window


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
    window : int or (int or None, int or None), optional
        W, or (W - 1, right): a row sees the last W keys up to its own, as Mistral's sliding_window says, and at most
        `right` after it, all of them where that is None and is_causal False. Older ones are overwritten, in a ring of
        W slots, and any number of tokens can be appended. A chunk of S > 1 new rows makes the ring W - 1 + S slots
        long until the next `reset`, so that its first row finds its keys; never longer than `capacity`. A capacity
        below W is no ring: it fills up as without a window.

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
        self._bounds = _as_bounds(call, window)
        self.window = None if self._bounds[0] is None else self._bounds[0] + 1
        self._is_ring = self.window is not None and self.window <= self.capacity
        self._adopt(self._new_arrays(call, self._fewest_slots()))
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
        bounds = self.window if self._bounds[1] is None else self._bounds
        extra += "" if bounds is None else f", window={bounds}"
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
            The cache is full or frozen, or shapes do not fit. Nothing has changed then, as with the others.
        TypeError
            Arrays of no float dtype.
        MemoryError
            No room for the longer ring that a chunk asks for.
        KeyboardInterrupt
            Either nothing has changed or, where a ring goes over older keys, all has been appended.
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
        if key.base is not None or value.base is not None:
            key, value = self._apart(key), self._apart(value)
        counts = as_counts(call, lengths, self.batch, rows)
        before, after = self._lengths, self._lengths + counts
        longest = max(after.tolist(), default=0)
        if self._is_ring:
            self._widen_ring(key, value, max(counts.tolist(), default=0))
        elif longest > self.capacity:
            self._explain_full(call, after)
        oldest, stores, lost = self._oldest, self._arrays_or_none(), False
        try:
            self._set_lengths(after, longest, np.maximum(oldest, after - self._slots) if self._is_ring else oldest)
            lost = longest > self._slots  # and no call of Python between this and C, which then does not stop halfway
            _core.cache_append(*stores, None, key, value, before, counts)
        except BaseException as error:
            if not lost or isinstance(error, (TypeError, ValueError, MemoryError)):  # C refused and wrote nothing
                self._set_lengths(before, None, oldest)
            raise

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
            Keys of masks, positions and weights are those of the longest sequence, Sk = lengths.max(). A window
            narrows the cache's own.

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
        if self._bounds != (None, None):
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
        changed = (after < self._lengths) & (after > 0)
        if (
            self._is_ring
            and self.window is not None
            and (changed & (self._oldest > np.maximum(0, after - self.window))).any()
        ):
            came = f"n is {most.tolist()} for lengths {self._lengths.tolist()}"
            wanted = f"the {self.window} keys before n were wanted, and those before {self._oldest.tolist()} are gone"
            fail(ValueError, call, came, wanted, "append what may be cropped in one call, which makes the ring longer")
        self._set_lengths(after, None, np.where(after > 0, self._oldest, 0))

    def reset(self) -> None:
        """Empty the cache, and thaw it. A ring that a long chunk has made longer is a window long again."""
        self._frozen = False
        nothing = np.zeros(self.batch, np.int64)  # lengths and oldest: neither is written to
        self._set_lengths(nothing, 0, nothing)
        if self._slots > self._fewest_slots():
            self._adopt(self._new_arrays("KVCache.reset", self._fewest_slots()))
            self._set_lengths(nothing, 0, nothing)

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
        self._set_lengths(self._lengths[source], None, self._oldest[source])

    def __copy__(self) -> "KVCache":
        """As deepcopy: two caches over the same memory would write over each other's rows."""
        return copy.deepcopy(self)

    # ---- how it lies ----

    def _fewest_slots(self) -> int:
        return self.capacity if self.window is None else min(self.window, self.capacity)

    def _new_arrays(self, call: str, slots: int) -> tuple[Array, Array, Array | None, Array | None]:
        """Keys, values and their scales, of so many slots a sequence."""
        what = "capacity" if slots == self.capacity else "window"
        sizes = {"batch": self.batch, "num_kv_heads": self.num_kv_heads, what: slots}
        shape, width = tuple(sizes.values()), self.v_head_dim
        keys, key_scales = make_store(call, (*shape, self.head_dim), self.dtype, **sizes, head_dim=self.head_dim)
        values, value_scales = make_store(call, (*shape, width), self.dtype, **sizes, v_head_dim=width)
        return keys, values, key_scales, value_scales

    def _adopt(self, arrays: tuple[Array, Array, Array | None, Array | None]) -> None:
        self._keys, self._values, self._key_scales, self._value_scales = arrays
        self._slots = self._keys.shape[2]

    def _apart(self, rows: Array) -> Array:
        """A copy where they may lie in the cache's own memory, as `keys` does: C writes there."""
        return rows.copy() if any(np.may_share_memory(rows, array) for array in self._arrays()) else rows

    def _arrays_or_none(self) -> tuple[Array, Array, Array | None, Array | None]:
        return self._keys, self._values, self._key_scales, self._value_scales

    def _arrays(self) -> list[Array]:
        return [array for array in self._arrays_or_none() if array is not None]

    def _set_lengths(self, lengths: Array, longest: int | None, oldest: Array) -> None:
        """New arrays each time: C may be reading the old ones. `longest` is the largest, where that is known."""
        self._lengths, self._oldest = lengths, oldest
        self._longest = longest if longest is not None else max(lengths.tolist(), default=0)
        self._cached = Cached(*self._arrays_or_none(), None, lengths, self._longest)

    def _explain_full(self, call: str, after: Array) -> NoReturn:
        """Says whose length would be more than the capacity."""
        b = int(np.argmax(after))
        came = f"the cache is full: sequence {b} has length {self._lengths[b]} of capacity {self.capacity}"
        wanted = f"room for {after[b] - self._lengths[b]} more was wanted, {after[b]} in all"
        fail(ValueError, call, came, wanted, f"make it with capacity={after[b]} or more, or crop or reset it")

    def _widen_ring(self, key: Array, value: Array, rows: int) -> None:
        """Room for a chunk and the window before its first row; keys move to their slots of the longer ring."""
        call, slots = "KVCache.append", min(self.capacity, (self.window or 0) - 1 + rows)
        if slots <= self._slots:
            return
        check_dtype("key", key, call)  # before anything changes
        check_dtype("value", value, call)
        longer = self._new_arrays(call, slots)
        for b, length in enumerate(self._lengths.tolist()):
            kept = np.arange(max(0, length - self._slots), length)
            for source, target in zip(self._arrays_or_none(), longer, strict=True):
                if source is not None and target is not None:
                    target[b][:, kept % slots] = source[b][:, kept % self._slots]
        self._adopt(longer)

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
        """The rules with this cache's window, or the part of it asked for; refuses rows whose keys are gone."""
        call, asked = "KVCache.attend", self._bounds
        if rules.get("window") is not None:
            asked = as_window(call, rules["window"])
            if self._is_ring and (asked[0] is None or asked[0] >= (self.window or 0)):
                wanted = f"at most the cache's own, {self._bounds}, was wanted, as older keys are gone"
                fail(ValueError, call, f"window is {rules['window']}", wanted, "leave it out")
            asked = _narrower(asked[0], self._bounds[0]), _narrower(asked[1], self._bounds[1])
        if self._is_ring and rules.get("key_positions") is not None:
            fail(ValueError, call, "key_positions is given", "a ring counts its keys itself", "leave it out")
        if self._is_ring and self._oldest.any():
            self._check_reach(query, rules, asked[0] or 0)
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


def _narrower(side: int | None, other: int | None) -> int | None:
    """Of two sides of a window, None being open."""
    return min((number for number in (side, other) if number is not None), default=None)


def _as_bounds(call: str, window: Any) -> tuple[int | None, int | None]:
    """How many keys before and after its own a row sees; None is all."""
    if window is None:
        return None, None
    if isinstance(window, (tuple, list)) or np.ndim(window):
        return as_window(call, window)
    return as_int(call, "window", window, 1) - 1, None
