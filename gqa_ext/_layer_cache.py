"""A layer that attends by way of a KVCache: what it takes, where its rows stand, and no trace of a failed call.

Called by module.py.
"""

from contextlib import suppress
from typing import Any

import numpy as np

from ._layer_arguments import as_position_ids
from ._messages import Array, fail, kind
from .cache import KVCache
from .rope import RotaryEmbedding


def as_cache(call: str, cache: Any, sizes: tuple[int, int, int], dtype: np.dtype[Any], given: Any) -> KVCache:
    """One for the layer's keys; ``sizes`` are num_kv_heads, head_dim and v_head_dim, ``given`` is key or value."""
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
    if cache.frozen and given is not None:
        wanted = "the cache's own keys were wanted, as it is frozen"
        fail(ValueError, call, "key or value is given", wanted, "leave them out, or set cache.frozen = False")
    return cache


def check_fit(call: str, cache: KVCache, query: Array) -> None:
    """As many sequences here as there, and rows that find the keys of their window when all are appended."""
    if len(query) != cache.batch:
        came = f"query has a batch of {len(query)} and cache of {cache.batch}"
        fail(ValueError, call, came, "the same was wanted", f"pass KVCache({len(query)}, ...)")
    rows, most = query.shape[1], cache.capacity - (cache.window or 0) + 1
    overwrites = not cache.frozen and cache.lengths.max(initial=0) + rows > cache.capacity
    if cache.window is not None and rows > most >= 1 and overwrites:
        came = f"query has {rows} rows and cache a window of {cache.window} in a capacity of {cache.capacity}"
        fix = "pass shorter chunks, or make the cache with a larger capacity"
        fail(ValueError, call, came, f"at most {most} at once were wanted", fix)


def place(
    call: str, position_ids: Any, query: Array, key: Array, own: bool, rope: RotaryEmbedding | None, cache: Any
) -> tuple[Array | None, Array | None]:
    """Positions of the query's rows and of the key's, None for 0 and on; ``own`` says that they are the same rows.

    Rows that a cache gets stand behind what it has.
    """
    given = None if position_ids is None else as_position_ids(call, position_ids, query, rope)
    if rope is None or cache is None or cache.frozen:
        return given, given if own else None
    behind = given if own and given is not None else cache.lengths[:, None] + np.arange(key.shape[-2])
    return behind if own else given, behind


def append_and_attend(
    cache: KVCache, q: Array, k: Array, v: Array, counts: Any, own: bool, rules: dict[str, Any]
) -> Any:
    """The call's keys behind those that are there, then attention to all; ``counts`` are the new rows that count.

    A call that fails takes its keys back, unless a window's ring lacks what they have overwritten.
    """
    before = cache.lengths
    cache.append(k, v, counts)
    try:
        return cache.attend(q, query_lengths=counts if own else None, **rules)
    except BaseException:
        with suppress(ValueError):
            cache.crop(before)
        raise
