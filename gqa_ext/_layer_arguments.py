"""What module.py accepts: each function returns an argument in the form the layer works with, or raises.

``call`` is the name that messages begin with.
"""

import math
import re
from typing import Any

import numpy as np

from ._arguments import as_array, as_dtype, as_int, as_mask, as_real, is_lower_right, rounded, same_place
from ._checks import check_lengths, check_mask
from ._messages import COMPUTED, HALVES, Array, fail, fits, kind, native, shapes
from ._rules import as_integers, as_slopes
from .rope import RotaryEmbedding

# ---- the constructor ----


def as_head_dim(call: str, head_dim: Any, embed_dim: int, num_heads: int) -> int:
    """The default shares embed_dim out among the heads."""
    if head_dim is not None:
        return as_int(call, "head_dim", head_dim, 1)
    if embed_dim % num_heads:
        came = f"embed_dim is {embed_dim} for num_heads {num_heads}"
        fail(ValueError, call, came, "a multiple of num_heads was wanted", "pass head_dim= for heads of another size")
    return embed_dim // num_heads


def as_layer_slopes(call: str, alibi_slopes: Any, num_heads: int) -> Array:
    """(num_heads,), or a row of them for each sequence."""
    slopes = as_slopes(call, alibi_slopes)
    if slopes.ndim not in (1, 2) or slopes.shape[-1] != num_heads:
        wanted = f"(num_heads,) = ({num_heads},) or (batch, {num_heads}) was wanted"
        fix = f"pass gqa_ext.get_alibi_slopes({num_heads})"
        fail(ValueError, call, f"alibi_slopes has shape {slopes.shape}", wanted, fix)
    return slopes.astype(np.float64)


def as_layer_dtype(call: str, dtype: Any) -> np.dtype[Any]:
    """float32 or float64, in native byte order."""
    number = native(as_dtype(call, "dtype", dtype, known="'float32' or 'float64'"))
    wanted, fix = "float32 or float64 was wanted", "pass dtype='float32'"
    if number in HALVES:
        fail(NotImplementedError, call, f"dtype is {number}, which is not implemented yet", wanted, fix)
    if number not in COMPUTED:
        fail(TypeError, call, f"dtype is {number}", wanted, fix)
    return number


def as_rope(call: str, rope: Any, head_dim: int) -> RotaryEmbedding:
    """One for heads of this size."""
    fix = f"pass rope=RotaryEmbedding({head_dim})"
    if not isinstance(rope, RotaryEmbedding):
        fail(TypeError, call, f"rope is {kind(rope)}", "a gqa_ext.RotaryEmbedding was wanted", fix)
    if rope.head_dim != head_dim:
        came, wanted = f"rope has head_dim {rope.head_dim}", f"the layer's head_dim {head_dim} was wanted"
        fail(ValueError, call, came, wanted, fix + ", with rotary_dim= if only some elements are turned")
    return rope


def as_eps(call: str, qk_norm: Any) -> float:
    """What keeps a norm's division finite."""
    fix = "pass the rms_norm_eps of the model's config.json, or None for heads without norm"
    eps = as_real(call, "qk_norm", qk_norm, fix)
    if not (math.isfinite(eps) and eps >= 0):
        fail(ValueError, call, f"qk_norm is {eps}", "a finite eps of at least 0 was wanted", fix)
    return eps


def as_rng(call: str, rng: Any) -> np.random.Generator:
    """Any seed that NumPy takes; a Generator is used as it stands."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        fix = "pass an int of at least 0, a numpy.random.Generator or None"
        fail(type(error), call, f"rng is {kind(rng)} ({error})", "a seed was wanted", fix)


# ---- the call ----


def is_same(key: Any, query: Any) -> bool:
    """The same object, or the same elements at the same addresses, as two slices of one array."""
    both = isinstance(key, np.ndarray) and isinstance(query, np.ndarray)
    return key is query or (both and same_place(key, query))


def as_inputs(
    call: str, query: Any, key: Any, value: Any, widths: tuple[int, int], dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """Three arrays that go together; ``widths`` are embed_dim and kv_embed_dim."""
    query = _as_input(call, "query", query, "embed_dim", widths[0], dtype)
    if key is None and widths[0] != widths[1]:
        came = f"key is None, and query has {widths[0]} features"
        fail(ValueError, call, came, f"kv_embed_dim {widths[1]} was wanted", "pass the sequence to attend to as key")
    key = query if key is None else _as_input(call, "key", key, "kv_embed_dim", widths[1], dtype)
    value = key if value is None else _as_input(call, "value", value, "kv_embed_dim", widths[1], dtype)
    where = shapes(query=query, key=key, value=value)
    if not query.ndim == key.ndim == value.ndim:
        came = f"query has {query.ndim} dimensions, key {key.ndim} and value {value.ndim}"
        fix = "add the batch with [None] or drop it with [0]"
        fail(ValueError, call, came, f"all with or all without a batch were wanted ({where})", fix)
    if key.shape[-2] != value.shape[-2]:
        came = f"value has {value.shape[-2]} rows but key has {key.shape[-2]}"
        fail(ValueError, call, came, f"each key needs its value ({where})", "leave value out to use key")
    if query.ndim == 3 and len({len(query), len(key), len(value)} - {1}) > 1:
        came = f"key has a batch of {len(key)} and value of {len(value)} but query of {len(query)}"
        fail(ValueError, call, came, f"the same or 1 was wanted ({where})", "repeat or slice one of them")
    return query, key, value


def _as_input(call: str, name: str, thing: Any, option: str, width: int, dtype: np.dtype[Any]) -> Array:
    """(B, N, width) or (N, width) of the layer's dtype."""
    array = as_array(call, name, thing)
    if not hasattr(thing, "dtype") and array.dtype.kind in "iuf":  # a list has no dtype that could disagree
        array = rounded(call, name, array, dtype)
    if native(array.dtype) != dtype:
        fix = f"pass {name}.astype(np.{dtype})"
        if native(array.dtype) in COMPUTED:
            fix += f", or build the layer with dtype={str(native(array.dtype))!r}"
        fail(TypeError, call, f"{name} has dtype {array.dtype}", f"the layer's dtype {dtype} was wanted", fix)
    if array.ndim not in (2, 3):
        wanted = f"(batch, sequence, {width}) or (sequence, {width}) was wanted"
        fix = f"pass {name}[None]" if array.ndim == 1 else "make one dimension of the leading ones with reshape"
        fail(ValueError, call, f"{name} has shape {array.shape}", wanted, fix)
    if array.shape[-1] != width:
        came, wanted = f"{name} has {array.shape[-1]} features", f"{option} {width} was wanted ({name} {array.shape})"
        fail(ValueError, call, came, wanted, f"pass other features, or build the layer with {option}={array.shape[-1]}")
    return array


def leading(*arrays: Array) -> tuple[int, ...]:
    """The leading dimensions of what as_inputs gave: equal, or a batch of 1."""
    shapes_of = [array.shape[:-2] for array in arrays]
    return next((shape for shape in shapes_of if shape != (1,)), (1,))


def as_kv_lengths(call: str, thing: Any, query: Array, key: Array, value: Array) -> Array:
    """From 0 to the rows of key, for each sequence."""
    lengths = as_integers(call, "kv_lengths", thing)
    where = f"({shapes(query=query, key=key)})"
    check_lengths("kv_lengths", lengths, leading(query, key, value), "key rows", key.shape[-2], where, call)
    return lengths


def as_layer_mask(call: str, thing: Any, scores: tuple[int, ...]) -> Array:
    """bool or float, broadcasting to the shape of the scores."""
    mask = as_mask(thing, call)
    check_mask(mask, scores, call)
    return mask


def as_alignment(call: str, thing: Any, is_causal: bool, query: Array, key: Array) -> str:
    """What None means; it warns where that could be meant otherwise."""
    return "lower_right" if is_lower_right(thing, is_causal, query, key, call) else "upper_left"


def as_position_ids(call: str, thing: Any, query: Array, rope: RotaryEmbedding | None) -> Array:
    """(N,) or (B, N) for a query (B, N, E)."""
    if rope is None:
        came, wanted = "position_ids is given", "a layer with rope was wanted, as nothing else reads them"
        fail(ValueError, call, came, wanted, "leave them out, or build the layer with rope=RotaryEmbedding(head_dim)")
    positions = as_integers(call, "position_ids", thing)
    target = query.shape[:-1]
    if positions.ndim == 0 or positions.shape[-1] != target[-1] or not fits(positions.shape, target):
        wanted = f"({target[-1]},) or {target} was wanted: one for each row ({shapes(query=query)})"
        fix = f"pass np.arange(n, n + {target[-1]}) where n tokens came before"
        fail(ValueError, call, f"position_ids has shape {positions.shape}", wanted, fix)
    return positions


def as_head_mask(call: str, thing: Any, num_heads: int, dtype: np.dtype[Any]) -> Array:
    """(num_heads,) of the layer's dtype."""
    array = as_array(call, "head_mask", thing)
    fix = f"pass {num_heads} factors, 1 to keep a head and 0 to switch it off"
    if array.dtype.kind not in "biuf" and native(array.dtype) not in HALVES:
        fail(TypeError, call, f"head_mask has dtype {array.dtype}", "real numbers were wanted", fix)
    if array.shape != (num_heads,):
        fail(ValueError, call, f"head_mask has shape {array.shape}", f"(num_heads,) = ({num_heads},) was wanted", fix)
    return rounded(call, "head_mask", array, dtype)


# ---- repr ----


def constructor_call(layer: Any, sizes: tuple[int, ...]) -> str:
    """The call that builds such a layer, without what is as by default; ``sizes`` are its positional arguments."""
    head_dim = layer.embed_dim // layer.num_heads if layer.embed_dim % layer.num_heads == 0 else None
    defaults = {
        "head_dim": head_dim, "v_head_dim": layer.head_dim, "kv_embed_dim": layer.embed_dim, "bias": False,
        "out_bias": layer.bias, "dropout": 0.0, "scale": None, "rope": None, "qk_norm": None, "window": None,
        "softcap": None, "alibi_slopes": None, "sinks": None, "dtype": "float32",
    }  # fmt: skip
    settings = {name: getattr(layer, name) for name in defaults}
    settings |= {"alibi_slopes": numbers(layer.alibi_slopes), "sinks": numbers(layer.sinks)}
    settings["dtype"] = layer.dtype.name
    given = [f"{name}={setting!r}" for name, setting in settings.items() if setting != defaults[name]]
    given = [re.sub(r"-?\b(inf|nan)\b", r"float('\g<0>')", text) for text in given]  # a sink of -inf is none
    return f"{type(layer).__name__}({', '.join([*map(repr, sizes), *given])})"


def numbers(array: Array | None) -> list[Any] | None:
    """The array as nested lists that are as short as its dtype allows."""
    if array is None:
        return None
    return [float(str(item)) if item.ndim == 0 else numbers(item) for item in array]
