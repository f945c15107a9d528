"""The rules of the score stage, from what a caller passes to what ``_core`` takes.

Runs only for a call that has a rule.  Small arrays are copied, so that nobody can change a length while
C reads by it.  What depends on the other arguments (shapes, the range of lengths) is C's to check and
_explain.py's to explain, but for ``sinks``.  Called by attention.py and, for its options, by module.py.
"""

import math
import operator
from typing import Any, NamedTuple

import numpy as np

from ._arguments import as_array, as_dropout, as_real, check_held
from ._messages import ANY_FLOAT, ATTENTION, FLOATS, Array, fail, heads, kind, native

_MOST = 2**63 - 1  # an int64


class Rules(NamedTuple):
    """In the order that ``_core.attention`` reads them; None is off, or open."""

    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    alibi_slopes: Array | None = None  # float32 or float64
    sinks: Array | None = None  # float32 or float64
    query_lengths: Array | None = None  # int64, as those below
    kv_lengths: Array | None = None
    query_positions: Array | None = None
    key_positions: Array | None = None
    cu_seqlens_q: Array | None = None  # int64, C-contiguous: packed sequences
    cu_seqlens_k: Array | None = None
    dropout_p: float = 0.0
    seed: int = 0
    weights: Array | None = None  # zeros that C writes the weights to
    cached_keys: int | None = None  # a cache: its keys, as the longest sequence counts them
    block_table: Array | None = None  # int64 (B, blocks)
    key_scales: Array | None = None  # float32, of int8 keys
    value_scales: Array | None = None


NO_RULES = Rules()


def as_rules(
    query: Array,
    causal_alignment: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    **integers: Any,
) -> Rules:
    """The rules of one call; ``integers`` are lengths and positions, named and ordered as in Rules."""
    if integers["query_positions"] is not None and causal_alignment is not None:
        came = f"query_positions is given beside causal_alignment {causal_alignment!r}"
        wanted = "one of them was wanted, as both say where the query rows stand"
        fail(ValueError, ATTENTION, came, wanted, "leave causal_alignment out")
    left, right = (None, None) if window is None else as_window(ATTENTION, window)
    given = {name: as_integers(ATTENTION, name, thing) for name, thing in integers.items() if thing is not None}
    return Rules(
        left=left,
        right=right,
        softcap=0.0 if softcap is None else as_softcap(ATTENTION, softcap, query.dtype),
        alibi_slopes=None if alibi_slopes is None else as_slopes(ATTENTION, alibi_slopes),
        sinks=None if sinks is None else as_sinks(ATTENTION, sinks, heads(query)),
        query_lengths=given.get("query_lengths"),
        kv_lengths=given.get("kv_lengths"),
        query_positions=given.get("query_positions"),
        key_positions=given.get("key_positions"),
    )


def as_window(call: str, thing: Any) -> tuple[int | None, int | None]:
    """How many positions before and after a row's own it sees; None is open."""
    wanted = "(left, right) was wanted, each a number of positions or None for all of them"
    window = thing.tolist() if isinstance(thing, np.ndarray) else thing
    if not isinstance(window, (tuple, list)):
        fix = "pass window=(left, right)"
        if isinstance(window, int) and not isinstance(window, bool) and window >= 0:
            fix = f"pass window=({window}, 0) for the {window} keys before each row and its own"
        fail(TypeError, call, f"window is {kind(window)}", wanted, fix)
    if len(window) != 2:
        fail(ValueError, call, f"window has {len(window)} items", wanted, "pass window=(left, right)")
    left, right = (side if side is None else _as_side(call, window, side) for side in window)
    if min(left or 0, right or 0) < 0:
        wanted = "sizes of at least 0 were wanted; FlashAttention's -1 is None here"
        left, right = (None if side is not None and side < 0 else side for side in (left, right))
        fail(ValueError, call, f"window is {tuple(window)}", wanted, f"pass window={(left, right)}")
    return left, right


def _as_side(call: str, window: Any, side: Any) -> int:
    """A whole number, cut to what int64 holds: no two positions lie further apart."""
    try:
        if isinstance(side, (bool, np.bool_)):
            raise TypeError
        return min(operator.index(side), _MOST)
    except TypeError:
        came, wanted = f"window is {tuple(window)}", "whole numbers were wanted, or None for an open side"
        fail(TypeError, call, came, wanted, "pass ints, as in window=(511, 0)")


def as_softcap(call: str, thing: Any, dtype: np.dtype[Any], wider: str = "float64 arrays") -> float:
    """A finite float of at least 0, which is off, that the arithmetic for ``dtype`` holds; ``wider`` as for a scale."""
    softcap = as_real(call, "softcap", thing, "pass a float, or None to leave scores as they are")
    if not (math.isfinite(softcap) and softcap >= 0):
        wanted = "a finite number of at least 0 was wanted, 0 or None to leave scores as they are"
        fix = "pass a positive one, as in softcap=50.0, or leave it out"
        fail(ValueError, call, f"softcap is {softcap}", wanted, fix)
    check_held(call, "softcap", softcap, dtype, wider, "leave it out where it is that large")
    return softcap


def as_slopes(call: str, thing: Any) -> Array:
    """Numbers that are not NaN."""
    slopes = _as_reals(call, "alibi_slopes", thing)
    if np.isnan(slopes).any():
        fix = "pass the slopes of your heads, as gqa_ext.get_alibi_slopes(num_heads) gives them, 0 for a head without"
        fail(ValueError, call, "alibi_slopes has a NaN", "numbers were wanted", fix)
    return slopes


def as_sinks(call: str, thing: Any, num_heads: int) -> Array:
    """One logit for each query head."""
    sinks = _as_reals(call, "sinks", thing)
    if sinks.shape != (num_heads,):
        wanted = f"one logit for each query head, ({num_heads},), was wanted"
        fail(ValueError, call, f"sinks has shape {sinks.shape}", wanted, f"pass {num_heads} numbers, -inf for no sink")
    return sinks


def _as_reals(call: str, name: str, thing: Any) -> Array:
    """A copy as float64, or as float32 where that holds the same numbers."""
    array = as_array(call, name, thing, "numbers")
    if array.dtype.kind not in "iu" and native(array.dtype) not in FLOATS:
        fix = f"pass {name}.astype(np.float32)"
        fail(TypeError, call, f"{name} has dtype {array.dtype}", f"{ANY_FLOAT} was wanted", fix)
    wide = array.dtype.kind in "iu" or array.dtype.itemsize == 8
    return array.astype(np.float64 if wide else np.float32)


def as_integers(call: str, name: str, thing: Any) -> Array:
    """A copy as int64."""
    array = as_array(call, name, thing, "integers")
    untyped = array.size == 0 and not hasattr(thing, "dtype")  # [] says nothing of its items
    if array.dtype.kind not in "iu" and not untyped:
        fix = f"pass {name}.astype(np.int64)"
        if array.dtype == np.bool_ and name.endswith("lengths"):
            fix = f"count what is there, as in {name}.sum(-1)"
            fix += "" if name == "lengths" else ", or pass it as attn_mask"  # append has none
        fail(TypeError, call, f"{name} has dtype {array.dtype}", "an array of integers was wanted", fix)
    if array.dtype.kind == "u" and array.size and array.max() > _MOST:
        wanted = "numbers that an int64 holds were wanted"
        fail(ValueError, call, f"{name} has {array.max()}", wanted, f"pass numbers up to {_MOST}")
    return array.astype(np.int64)


def with_dropout(rules: Rules, dropout_p: Any, rng: Any, call: str = ATTENTION) -> Rules:
    """The rules and dropout; a Generator gives its one seed only where something can be dropped."""
    probability = as_dropout(call, "dropout_p", dropout_p)
    seed = as_seed(call, rng) if probability or not isinstance(rng, np.random.Generator) else 0
    return rules._replace(dropout_p=probability, seed=seed)


def as_seed(call: str, rng: Any) -> int:
    """The number that dropout is a function of: an int as it is, one draw from a Generator, or one by chance."""
    if rng is None:
        rng = np.random.default_rng()
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**63))
    if isinstance(rng, (bool, np.bool_)) or not isinstance(rng, (int, np.integer)):
        wanted = "an int, a np.random.Generator or None was wanted"
        fail(TypeError, call, f"rng is {kind(rng)}", wanted, "pass rng=0 or rng=np.random.default_rng(0)")
    return int(rng) & (2**64 - 1)
