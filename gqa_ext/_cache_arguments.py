"""What KVCache and PagedKVCache are made of, and the rows appended to them. Called by cache.py and paged.py."""

import math
from typing import Any

import numpy as np

from ._arguments import as_array, as_dtype
from ._messages import Array, fail, fits, native
from ._rules import as_integers

DTYPES = ("float32", "float16", "bfloat16", "int8")


def as_cache_dtype(call: str, thing: Any) -> np.dtype[Any]:
    """One of the types that a cache can hold."""
    known = ", ".join(f'"{name}"' for name in DTYPES)
    dtype = native(as_dtype(call, "dtype", thing, f"one of {known}"))
    if dtype.name not in DTYPES:
        wanted = f"one of {', '.join(DTYPES)} was wanted"
        fail(TypeError, call, f"dtype is {dtype}", wanted, 'pass dtype="float32"; what is appended is cast to it')
    return dtype


def make_store(call: str, shape: tuple[int, ...], dtype: np.dtype[Any], **sizes: int) -> tuple[Array, Array | None]:
    """Rows (..., D), and their scales if the dtype needs them; the sizes are those that were asked for."""
    try:
        return np.zeros(shape, dtype), np.zeros(shape[:-1], np.float32) if dtype == np.int8 else None
    except (MemoryError, ValueError, OverflowError):  # the latter two beyond what can be addressed
        wanted = f"an array {shape} of {math.prod(shape) * dtype.itemsize:,} bytes was wanted, and memory has no room"
        most = max(sizes, key=sizes.__getitem__)
        fail(MemoryError, call, f"{most} is {sizes[most]}", wanted, f"pass a smaller {most}")


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
