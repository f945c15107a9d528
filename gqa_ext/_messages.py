"""The words that error messages are made of.

A message has five parts: the call, the argument, what came, what was wanted, and the fix.  Used by everything that
checks an argument: the conversions before a call of C, _checks.py, and _explain.py after C said no.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ATTENTION = "scaled_dot_product_attention"
ROPE = "RotaryEmbedding.__call__"
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
COMPUTED = (np.dtype(np.float32), np.dtype(np.float64))
FLOATS = (*HALVES, *COMPUTED)


def one_of(dtypes: Iterable[np.dtype[Any]]) -> str:
    """``float16, bfloat16 or float32``."""
    *first, last = (dtype.name for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


ANY_FLOAT = one_of(FLOATS)


def fail(error: type[Exception], call: str, came: str, wanted: str, fix: str = "") -> NoReturn:
    """Raise ``error`` with the five parts of a message; ``came`` opens with the argument's name."""
    raise error(f"{call}(): {came}; {wanted}" + (f": {fix}" if fix else ""))


def retold(error: Exception, call: str) -> Exception:
    """The refusal of a call within as one of the call that was made; another exception as it is."""
    _, refusal, message = str(error).partition("(): ")
    return type(error)(f"{call}(): {message}") if refusal else error


def shapes(**arrays: Array | None) -> str:
    """``query (2, 8, 5, 64), key (2, 2, 5, 64)``."""
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array is not None)


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype, whatever byte order its arrays have."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def kind(thing: Any) -> str:
    """``None``, ``0.5, a float``, ``a list``, ``a torch.Tensor``."""
    if thing is None or isinstance(thing, (bool, np.bool_, type)):
        return repr(thing)
    cls = type(thing)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    name = ("an " if name[0] in "aeiou" else "a ") + name
    return f"{short(thing)}, {name}" if isinstance(thing, (int, float, complex, str, bytes)) else name


def short(thing: Any) -> str:
    """What it looks like, in at most 40 characters; dots say that there is more."""
    try:
        text = repr(thing)
    except ValueError:  # Python prints no int of more than 4300 digits
        text = hex(thing)
    return text if len(text) <= 40 else f"{text[:37]}..."


def brief(thing: Any) -> str:
    """Dtype and shape of an array, else what kind of thing it is."""
    return f"{thing.dtype} {thing.shape}" if isinstance(thing, np.ndarray) else kind(thing)


def count(number: int, noun: str) -> str:
    """``1 head``, ``2 heads``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def divisors(number: int) -> str:
    """``1, 2, 4, 8``, those up to 256."""
    return ", ".join(str(n) for n in range(1, min(number, 256) + 1) if number % n == 0)


def heads(array: Array) -> int:
    """Two dimensions mean one head."""
    return array.shape[-3] if array.ndim > 2 else 1


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``target`` without widening it."""
    try:
        return shape == target or np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False
