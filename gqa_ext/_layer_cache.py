"""A layer's attention with a KVCache and without: what it takes, where rows stand, and no trace of a failed call.

Called by module.py.
"""

from contextlib import suppress
from typing import Any

import numpy as np

from ._cached import check_names
from ._layer_arguments import as_position_ids
from ._messages import Array, fail, kind, retold
from .attention import scaled_dot_product_attention
from .cache import KVCache
from .rope import RotaryEmbedding


def as_cache(
    call: str, cache: Any, sizes: tuple[int, int, int], dtype: np.dtype[Any], alignment: Any, **keys: Any
) -> KVCache:
    """One for the layer's keys; ``sizes`` are num_kv_heads, head_dim and v_head_dim, ``keys`` what says of new ones."""
    make = "KVCache(batch, {}, {}, v_head_dim={}, capacity=...)".format(*sizes)
    if not isinstance(cache, KVCache):
        fail(TypeError, call, f"cache is {kind(cache)}", "a gqa_ext.KVCache was wanted", f"pass {make}")
    own = (cache.num_kv_heads, cache.head_dim, cache.v_head_dim)
    if own != sizes:
        came = "cache has num_kv_heads {}, head_dim {} and v_head_dim {}".format(*own)
        fail(ValueError, call, came, "the layer's {}, {} and {} were wanted".format(*sizes), f"pass {make}")
    if dtype == np.float64:
        came = "cache is given to a layer of dtype float64"
        fail(TypeError, call, came, "float32 was wanted: no cache holds float64", "build it with dtype='float32'")
    if alignment is not None:
        check_names(call, {"causal_alignment": alignment})
    given = [name for name, thing in keys.items() if thing is not None]
    if cache.frozen and given:
        wanted = "the cache's own keys were wanted, as it is frozen"
        fail(ValueError, call, f"{given[0]} is given", wanted, f"leave {given[0]} out, or set cache.frozen = False")
    return cache


def check_fit(call: str, cache: KVCache, query: Array, key: Array, window: Any) -> None:
    """As many sequences here as there, and rows that find the keys of their window when all are appended."""
    width = cache.window or 0
    most = cache.capacity - width + 1  # rows that a ring can take at once
    is_ring = width > 0 and most >= 1
    if is_ring and window is not None and (window[0] is None or window[0] >= width):
        came = f"cache has a window of {cache.window} and the layer one of {window}"
        wide = "no window" if window[0] is None else f"window={window[0] + 1}"
        fail(ValueError, call, came, "keys that the layer's rows see were wanted", f"make the cache with {wide}")
    for name, array in (("query", query), ("key", key)):
        if len(array) != cache.batch:
            came = f"{name} has a batch of {len(array)} and cache of {cache.batch}"
            fail(ValueError, call, came, "the same was wanted", f"pass KVCache({len(array)}, ...)")
    rows = key.shape[1]
    overwrites = not cache.frozen and cache.lengths.max(initial=0) + rows > cache.capacity
    if is_ring and rows > most and overwrites:
        came = f"key has {rows} rows and cache a window of {cache.window} in a capacity of {cache.capacity}"
        fix = "pass shorter chunks, or make the cache with a larger capacity"
        fail(ValueError, call, came, f"at most {most} at once were wanted", fix)


def num_keys(cache: KVCache | None, key: Array, counts: Array | None) -> int:
    """What masks and weights count: the keys of the longest sequence, those of this call among them."""
    rows: int = key.shape[-2]
    if cache is None:
        return rows
    new = 0 if cache.frozen else rows if counts is None else counts
    return int(np.max(cache.lengths + new, initial=0))


def place(
    call: str,
    position_ids: Any,
    query: Array,
    key: Array,
    own: bool,
    rope: RotaryEmbedding | None,
    cache: KVCache | None,
) -> tuple[Array | None, Array | None]:
    """Positions of the query's rows and of the key's, None for 0 and on; ``own`` says that they are the same rows.

    Rows that a cache gets stand behind what it has.
    """
    given = None if position_ids is None else as_position_ids(call, position_ids, query, rope)
    if rope is None or cache is None or cache.frozen:
        return given, given if own else None
    behind = given if own and given is not None else cache.lengths[:, None] + np.arange(key.shape[-2])
    return behind if own else given, behind


def attend(
    call: str, cache: KVCache | None, q: Array, k: Any, v: Any, counts: Any, own: bool, rules: dict[str, Any]
) -> Any:
    """Attention to the call's keys, behind those of the cache if there is one; without keys, to what is in the cache.

    ``counts`` says how many of these keys are there. A call that fails takes its keys back, unless a window's ring
    lacks what they have overwritten.
    """
    try:
        return _attend(cache, q, k, v, counts, own, rules)
    except (TypeError, ValueError, MemoryError) as error:
        raise retold(error, call) from None


def _attend(cache: KVCache | None, q: Array, k: Any, v: Any, counts: Any, own: bool, rules: dict[str, Any]) -> Any:
    if cache is None:
        return scaled_dot_product_attention(q, k, v, kv_lengths=counts, **rules)
    if k is None:
        return cache.attend(q, **rules)
    if own and counts is not None:
        rules = rules | {"query_lengths": counts}
    before = cache.lengths
    try:
        cache.append(k, v, counts)
        return cache.attend(q, **rules)
    except BaseException:
        with suppress(ValueError):
            cache.crop(before)
        raise
