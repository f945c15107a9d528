"""Attention over keys and values that a cache holds: what cache.py and paged.py share.

A cache is a few arrays and the lengths of its sequences; C finds each key in them.  The last query row of a
sequence always belongs to its last key.
"""

from typing import Any, NamedTuple

import numpy as np

from . import _arguments, _checks, _core, _explain
from ._messages import Array, fail, heads, retold
from ._rules import NO_RULES, Rules, as_integers, as_sinks, as_slopes, as_softcap, as_window, with_dropout
from .attention import attend_into, room_for_weights


class Cached(NamedTuple):
    """Where the keys are."""

    keys: Array  # (B, Hkv, slots, D): key j is in slot j % slots; or blocks (N, Hkv, rows, D)
    values: Array
    key_scales: Array | None  # float32 (B, Hkv, slots) or (N, Hkv, rows), of int8
    value_scales: Array | None
    block_table: Array | None  # int64 (B, blocks)
    lengths: Array  # int64 (B,), never written to
    longest: int  # what masks and positions of keys count

    def plain_rules(self) -> Rules:
        """Where the keys are, and no rule beside."""
        return tuple.__new__(Rules, (*_NO_CACHE_BEFORE, self.lengths, *_NO_CACHE_AFTER, self.longest,
                                     self.block_table, self.key_scales, self.value_scales))  # fmt: skip


# Rules up to kv_lengths, and those between it and cached_keys: a call with all of them by name takes a microsecond.
_PLACE = Rules._fields.index("kv_lengths")
_NO_CACHE_BEFORE = NO_RULES[:_PLACE]
_NO_CACHE_AFTER = NO_RULES[_PLACE + 1 : Rules._fields.index("cached_keys")]

_WHY_NOT = {
    "causal_alignment": "the last query row belongs to the last key, always",
    "kv_lengths": "a cache knows its own lengths",
    "enable_gqa": "query head h reads key head h // (Hq // Hkv), always",
}


def attend_cached(call: str, cached: Cached, query: Any, is_causal: Any, rules: dict[str, Any]) -> Any:
    """One call of attention; ``rules`` are keywords of scaled_dot_product_attention."""
    try:
        if not rules and type(query) is np.ndarray and type(is_causal) is bool:
            arrays = (query, cached.keys, cached.values)
            return _core.attention(*arrays, None, is_causal, True, None, True, cached.plain_rules(), None, False)
        check_names(call, rules)
        return _attend_by_rules(call, cached, query, is_causal, **rules)
    except (TypeError, ValueError, MemoryError) as error:  # _explain.py does not know whose cache it was
        raise retold(error, call) from None


def check_names(call: str, rules: dict[str, Any]) -> None:
    """A rule that a cache knows better, or that no call knows."""
    known = _attend_by_rules.__kwdefaults__ or {}
    for name in rules:
        if name in known:
            continue
        wanted = f"it was not wanted, as {_WHY_NOT[name]}" if name in _WHY_NOT else f"known are {', '.join(known)}"
        fail(TypeError, call, f"{name} is given", wanted, f"leave {name} out")


def _attend_by_rules(
    call: str, cached: Cached, query: Any, is_causal: Any, *, attn_mask: Any = None, scale: Any = None,
    window: Any = None, softcap: Any = None, alibi_slopes: Any = None, sinks: Any = None, query_lengths: Any = None,
    query_positions: Any = None, key_positions: Any = None, dropout_p: Any = 0.0, rng: Any = None,
    return_lse: Any = False, return_weights: Any = False, out: Any = None,
) -> Any:  # fmt: skip
    query = _arguments.as_array(call, "query", query)
    left, right = (None, None) if window is None else as_window(call, window)
    integers = {"query_lengths": query_lengths, "query_positions": query_positions, "key_positions": key_positions}
    given: dict[str, Any] = {n: as_integers(call, n, thing) for n, thing in integers.items() if thing is not None}
    rules = with_dropout(cached.plain_rules(), dropout_p, rng, call)._replace(
        left=left, right=right,
        softcap=0.0 if softcap is None else as_softcap(call, softcap, query.dtype, wider=""),
        alibi_slopes=None if alibi_slopes is None else as_slopes(call, alibi_slopes),
        sinks=None if sinks is None else as_sinks(call, sinks, heads(query)),
        weights=_room(call, query, cached) if _arguments.as_flag(call, "return_weights", return_weights) else None,
        **given)  # fmt: skip
    problem = (
        query, cached.keys, cached.values,
        None if attn_mask is None else _arguments.as_mask(attn_mask, call),
        _arguments.as_flag(call, "is_causal", is_causal), True,
        None if scale is None else _arguments.as_scale(call, scale, query.dtype, wider=""), True, rules,
    )  # fmt: skip
    wants_lse = _arguments.as_flag(call, "return_lse", return_lse)
    result = _core.attention(*problem, None, wants_lse) if out is None else attend_into(out, problem, wants_lse, call)
    if rules.weights is None:
        return result
    return (*result, rules.weights) if wants_lse else (result, rules.weights)


def _room(call: str, query: Array, cached: Cached) -> Array | None:
    """Zeros (..., Hq, Sq, keys) for weights; None where the query does not fit, which C will say."""
    key, value = _explain.cache_as_arrays(cached.keys, cached.values, cached.block_table, cached.longest)
    try:
        shape = (*_checks.output_shape(query, key, value)[:-1], cached.longest)
    except (ValueError, IndexError):
        return None
    return room_for_weights(call, shape, query)
