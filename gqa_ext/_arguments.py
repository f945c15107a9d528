"""From what a caller passes to what ``_core`` takes: exact ndarrays, ``bool`` and ``float``.

These functions run only when an argument is not already of that type, so that the usual call pays for
a type check and no more.  What can be converted without a guess is; the rest raises.
"""

import math
import operator
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ._messages import ATTENTION, Array, divisors, fail, heads, kind, short

SLOTS = ("query", "key", "value")  # arrays whose rows attn_mask can drop
_MASKS = "bools or floating-point numbers"
_MAKE = {  # how arrays of these are made, else of np.float32
    "integers": "np.asarray({}, np.int64)",
    _MASKS: "np.asarray({}, bool), True where a key is seen, or np.float32, added to scores",
}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_PACKAGE = str(Path(__file__).parent) + os.sep


def as_array(call: str, name: str, thing: Any, of: str = "floating-point numbers") -> Array:
    """An exact ndarray over the same memory where there is one (lists are copied); ``of`` is for messages."""
    if type(thing) is np.ndarray and thing.dtype != object:
        return thing
    wanted = f"an array of {of} was wanted"
    fix = "pass " + _MAKE.get(of, "np.asarray({}, np.float32)").format(name)
    if isinstance(thing, np.ma.MaskedArray):
        fail(TypeError, call, f"{name} is a masked array", "a plain array was wanted", _filled(call, name, thing))
    if thing is None or isinstance(thing, (bool, str, bytes)):
        fail(TypeError, call, f"{name} is {kind(thing)}", wanted, f"pass an array as {name}")
    try:
        array = np.asarray(thing)
    except ValueError as error:
        came = f"{name} is {kind(thing)} that is no array ({error})"
        fail(ValueError, call, came, wanted, "make its rows equally long")
    except (TypeError, RuntimeError) as error:
        fix = f"convert it first, as in np.asarray({name}.detach().float().cpu())"
        fail(TypeError, call, f"{name} is {kind(thing)} that NumPy cannot read ({error})", wanted, fix)
    if array.dtype == object:
        fail(TypeError, call, f"{name} is {kind(thing)} of Python objects", wanted, fix)
    return array


def _filled(call: str, name: str, thing: np.ma.MaskedArray[Any, Any]) -> str:
    """How a plain array is made of a masked one."""
    if name == "attn_mask":
        return f"pass attn_mask.filled({False if thing.dtype.kind in 'biu' else '-np.inf'}), which masks those slots"
    return f"pass {name}.filled(...)" + (
        " and the masked slots in attn_mask" if name in SLOTS and "append" not in call else ""
    )


def as_arrays(**things: Any) -> list[Array]:
    """query, key and value of an attention call."""
    return [thing if type(thing) is np.ndarray else as_array(ATTENTION, name, thing) for name, thing in things.items()]


def as_mask(thing: Any, call: str = ATTENTION) -> Array:
    """attn_mask as an ndarray; a Python bool there is a slip of position."""
    if isinstance(thing, (bool, np.bool_)):
        fix = f"pass is_causal={bool(thing)} by its name"
        fail(TypeError, call, f"attn_mask is {bool(thing)}", "an array was wanted", fix)
    return as_array(call, "attn_mask", thing, _MASKS)


def as_flag(call: str, name: str, thing: Any) -> bool:
    """True or False; NumPy's are taken, numbers are not."""
    if isinstance(thing, (bool, np.bool_)):
        return bool(thing)
    fix = f"pass {name}=True or False" + (", and scale by its name" if isinstance(thing, float) else "")
    return fail(TypeError, call, f"{name} is {kind(thing)}", "True or False was wanted", fix)


def as_str(call: str, name: str, thing: Any, fix: str) -> str:
    """Text."""
    if not isinstance(thing, str):
        fail(TypeError, call, f"{name} is {kind(thing)}", "a str was wanted", fix)
    return thing


def as_flags(**things: Any) -> list[bool]:
    """The switches of an attention call."""
    return [as_flag(ATTENTION, name, thing) for name, thing in things.items()]


def as_index(call: str, name: str, thing: Any, fix: str) -> int:
    """A whole number from whatever says it is one; bools are none."""
    number: Any = None if isinstance(thing, (bool, np.bool_)) else thing
    try:
        return operator.index(number)
    except TypeError:
        fail(TypeError, call, f"{name} is {kind(thing)}", "an int was wanted", fix)


def as_int(call: str, name: str, thing: Any, least: int, fix: str = "") -> int:
    """A whole number of at least ``least``."""
    fix = fix or f"pass {name}={least} or more"
    number = as_index(call, name, thing, fix)
    if number < least:
        fail(ValueError, call, f"{name} is {number}", f"at least {least} was wanted", fix)
    return number


def as_kv_heads(call: str, num_kv_heads: Any, num_heads: int) -> int:
    """A divisor of num_heads."""
    number = as_int(call, "num_kv_heads", num_kv_heads, 1)
    if num_heads % number:
        came = f"num_kv_heads is {number} for num_heads {num_heads}"
        fail(ValueError, call, came, "a divisor of num_heads was wanted", f"pass one of {divisors(num_heads)}")
    return number


def as_axis(call: str, axis: Any, name: str, array: Array, fix: str) -> int:
    """The index of an axis of ``array``, counted from the first."""
    place = as_index(call, "axis", axis, fix)
    if not -array.ndim <= place < array.ndim:
        fail(ValueError, call, f"axis is {place}", f"an axis of {name} {array.shape} was wanted", fix)
    return place % array.ndim


def as_dtype(call: str, name: str, thing: Any, known: str = '"float16", "bfloat16" or "float32"') -> np.dtype[Any]:
    """A dtype with a size; None, which NumPy takes for float64, is not one."""
    try:
        dtype: np.dtype[Any] = np.dtype(thing)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses strings with Python's own parser
        dtype = np.dtype(object)
    if thing is None or dtype.hasobject or dtype.itemsize == 0:
        fail(TypeError, call, f"{name} is {kind(thing)}", "a dtype was wanted", f"pass {name}={known}")
    return dtype


def as_real(call: str, name: str, thing: Any, fix: str) -> float:
    """A real number, from Python or NumPy or a zero-dimensional array."""
    strange = isinstance(thing, (np.ndarray, np.generic)) and thing.dtype.kind not in "iufV"  # V: bfloat16
    if strange or isinstance(thing, (bool, str, bytes)) or getattr(thing, "ndim", 0) != 0:
        fail(TypeError, call, f"{name} is {kind(thing)}", "a real number was wanted", fix)
    try:
        return float(thing)
    except (TypeError, ValueError, OverflowError) as error:
        bad = ValueError if isinstance(error, OverflowError) else TypeError
        fail(bad, call, f"{name} is {kind(thing)}", "a real number was wanted", fix)


def as_scale(call: str, thing: Any, dtype: np.dtype[Any], wider: str = "float64 arrays") -> float:
    """A finite float that the arithmetic for ``dtype`` holds; ``wider`` is what to pass for float64's, if anything."""
    fix = "pass a float, or None for 1/sqrt(head_dim)"
    scale = thing if type(thing) is float else as_real(call, "scale", thing, fix)
    if not math.isfinite(scale):
        wanted = "a finite number was wanted, or None for 1/sqrt(head_dim)"
        fail(ValueError, call, f"scale is {scale}", wanted, "leave it out or pass a finite one")
    check_held(
        call, "scale", scale, dtype, wider, "multiply query by it in float64, cast that back, and pass scale=1.0"
    )
    return scale


def check_held(call: str, name: str, number: float, dtype: np.dtype[Any], wider: str, other: str) -> None:
    """Where scores are made in float32, a number that it holds with all its digits; two ways to mend it."""
    if number and not _SMALLEST <= abs(number) <= _LARGEST and dtype.itemsize < 8:
        wanted = f"0 or a size from {_SMALLEST:.3g} to {_LARGEST:.3g} was wanted, as scores are made in float32"
        fail(ValueError, call, f"{name} is {number}", wanted, f"pass {wider}, or {other}" if wider else other)


def as_dropout(call: str, name: str, thing: Any) -> float:
    """A probability."""
    fix = f"pass {name}=0.0"
    slip = ", and is_causal by its name" if name == "dropout_p" else ""
    probability = as_real(call, name, thing, fix + slip)
    if not 0.0 <= probability <= 1.0:
        fail(ValueError, call, f"{name} is {probability}", "a probability between 0 and 1 was wanted", fix)
    return probability


def share_heads(query: Array, key: Array, value: Array) -> list[Array]:
    """enable_gqa=False, as in torch: heads broadcast like any dimension, so 1 goes with any number.

    Heads that do not broadcast come back as they are; C refuses them.
    """
    arrays = [query, key, value]
    wide = {heads(array) for array in arrays} - {1}
    if len(wide) != 1 or min(array.ndim for array in arrays) < 2:
        return arrays
    shapes = [(*array.shape[:-3], *wide, *array.shape[-2:]) for array in arrays]
    return [np.broadcast_to(array, shape) for array, shape in zip(arrays, shapes, strict=True)]


def is_lower_right(alignment: Any, is_causal: bool, query: Array, key: Array, call: str = ATTENTION) -> bool:
    """The alignment as ``_core`` takes it: upper left where none is given, as in torch."""
    if alignment is None:
        if is_causal and query.shape[-2:-1] != key.shape[-2:-1]:
            warn_unequal(call, query, key)
        return False
    if not isinstance(alignment, str) or alignment not in ("upper_left", "lower_right"):
        wanted = "'upper_left', 'lower_right' or None was wanted"
        fix = "pass 'lower_right' where the last query row belongs to the last key, else leave it out"
        fail(ValueError, call, f"causal_alignment is {short(alignment)}", wanted, fix)
    return alignment == "lower_right"


def warn_unequal(call: str, query: Array, key: Array) -> None:
    """is_causal between unequal lengths has two meanings; say which one runs."""
    if query.ndim < 2 or key.ndim < 2:
        return  # C refuses them
    message = (
        f"{call}(): is_causal with {query.shape[-2]} query rows and {key.shape[-2]} key rows aligns "
        "the first of both, as torch does; for decoding and chunked prefill, where the last ones belong together, pass "
        "causal_alignment='lower_right'; pass 'upper_left' to keep this without a warning"
    )
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def rounded(
    call: str, name: str, array: Array, dtype: np.dtype[Any], fix: str = "build the layer with dtype='float64'"
) -> Array:
    """A copy in a layer's dtype; a finite number that would become infinite there is refused."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    lost = np.isinf(result) & np.isfinite(array)
    if lost.any():
        wanted = f"numbers that {dtype} holds were wanted, up to {np.finfo(dtype).max:.3g}"
        fail(ValueError, call, f"{name} has {array[lost][0]}", wanted, fix)
    return result


def room(
    call: str, name: str, shape: tuple[int, ...], dtype: Any, fix: str, make: Callable[..., Array] = np.empty
) -> Array:
    """A new array, or a MemoryError; where no address counts so many bytes NumPy calls it a ValueError."""
    try:
        return make(shape, dtype)
    except (ValueError, OverflowError, MemoryError):
        fail(MemoryError, call, f"{name} would have shape {shape}", "an array that memory can hold was wanted", fix)


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share a byte; where that is too hard to tell, yes."""
    enough: Any = 10_000  # candidate solutions, some microseconds; NumPy's stub knows only -1 and 0
    try:
        return np.shares_memory(a, b, max_work=enough)
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Array) -> bool:
    """Whether two elements share a byte.

    Shift both along the first axis in which their indices differ: one of them then has index 0 there and
    zeros before, the other a later index.  So each axis asks its first slice against the rest.
    """
    if array.size == 0:
        return False
    while array.ndim:
        if overlap(array[:1], array[1:]):
            return True
        array = array[0, ...]
    return False


def same_place(a: Array, b: Array) -> bool:
    """The same elements at the same addresses."""
    return a.__array_interface__["data"] == b.__array_interface__["data"] and (
        a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype
    )


def clashes(out: Array, same: Array, *others: Array | None) -> bool:
    """Whether ``out`` lies on an input of C, which reads while it writes; ``same`` alone may lie in the same place."""
    return (overlap(out, same) and not same_place(out, same)) or any(
        overlap(out, array) for array in others if array is not None
    )


def as_out(thing: Any, call: str = ATTENTION) -> Array:
    """``out`` as an exact ndarray over the same memory, fit to be written."""
    wanted = "an ndarray of the result's shape and dtype was wanted"
    fix = "pass np.empty(shape, dtype), or leave it out"
    if not isinstance(thing, np.ndarray) or isinstance(thing, np.ma.MaskedArray):
        fail(TypeError, call, f"out is {kind(thing)}", wanted, fix)
    out = np.asarray(thing)
    if not out.flags.writeable:
        fail(ValueError, call, "out is read-only", "an array that can be written was wanted", fix)
    if not out.flags.c_contiguous and overlaps_itself(out):
        came = f"out has elements that share memory (shape {out.shape}, strides {out.strides})"
        fail(ValueError, call, came, "each element needs its own place", fix)
    return out
