"""Attention over a set of keys from attention over its parts."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import as_array
from ._messages import ANY_FLOAT, FLOATS, Array, fail, kind, native

CALL = "merge_attention"


def merge_attention(outs: Iterable[ArrayLike], lses: Iterable[ArrayLike]) -> tuple[Array, Array]:
    """Merge attention over disjoint sets of keys into attention over all of them.

    Part p of a row weighs exp(lse[p]) / sum(exp(lse)), which is exact; ring attention (arXiv:2310.01889) and
    FlashDecoding merge so. Computed in float64 whatever the dtype, and rounded once.

    Parameters
    ----------
    outs : sequence of array_like (..., Sq, Dv), float16, bfloat16, float32 or float64
        Outputs for the same query rows, all of one shape and dtype; at least one. Any layout that has rows
        before features, (T, H, Dv) too.
    lses : sequence of array_like (..., Sq), float32 or float64
        What ``return_lse=True`` gave beside them. -inf says that the part has no key for the row: the part is
        left out, whatever its output holds.

    Returns
    -------
    out : ndarray (..., Sq, Dv), dtype of the parts
        0 where no part has a key.
    lse : ndarray (..., Sq), dtype of the lses
        -inf there.

    Raises
    ------
    ValueError
        No part, as many outs as lses are not there, or shapes that differ.
    TypeError
        Dtypes that differ or are no float, or a thing that is no array.

    Notes
    -----
    Give ``sinks`` to exactly one part: a sink belongs to the row, and each part that has it counts it once more.

    Examples
    --------
    >>> import numpy as np
    >>> from gqa_ext import merge_attention, scaled_dot_product_attention
    >>> query, key, value = np.ones((3, 4)), np.eye(6, 4), np.eye(6)
    >>> parts = [scaled_dot_product_attention(query, key[cut], value[cut], return_lse=True)
    ...          for cut in (slice(0, 2), slice(2, 6))]
    >>> out, lse = merge_attention(*zip(*parts))
    >>> np.allclose(out, scaled_dot_product_attention(query, key, value))
    True
    """
    parts = _as_parts(outs, lses)
    out_dtype, lse_dtype = (native(array.dtype) for array in parts[0])
    with np.errstate(all="ignore"):  # inf - inf and NaN of parts that are left out
        lses64 = np.stack([lse.astype(np.float64) for _, lse in parts])
        top = lses64.max(axis=0)
        top = np.where(top == -np.inf, 0.0, top)
        weights = np.exp(lses64 - top)
        total = weights.sum(axis=0)
        weights /= np.where(total == 0, 1.0, total)
        merged = np.zeros(parts[0][0].shape)
        for (out, _), weight, lse64 in zip(parts, weights, lses64, strict=True):
            np.add(merged, weight[..., None] * out.astype(np.float64), out=merged, where=(lse64 != -np.inf)[..., None])
        return merged.astype(out_dtype), (top + np.log(total)).astype(lse_dtype)


def _as_parts(outs: Any, lses: Any) -> list[tuple[Array, Array]]:
    """Pairs of arrays that go together."""
    out_parts, lse_parts = _as_list("outs", outs), _as_list("lses", lses)
    if len(out_parts) != len(lse_parts) or not out_parts:
        came = f"outs has {len(out_parts)} parts and lses has {len(lse_parts)}"
        fail(ValueError, CALL, came, "one of each for every part was wanted", "pass [out_0, ...] and [lse_0, ...]")
    first_out, first_lse = out_parts[0], lse_parts[0]
    for p, (out, lse) in enumerate(zip(out_parts, lse_parts, strict=True)):
        if out.ndim < 2:
            wanted = "(..., rows, features) was wanted"
            fail(ValueError, CALL, f"outs[{p}] has shape {out.shape}", wanted, "pass a list of outputs as outs")
        if lse.shape != out.shape[:-1]:
            came = f"lses[{p}] has shape {lse.shape} for outs[{p}] {out.shape}"
            fail(ValueError, CALL, came, f"{out.shape[:-1]} was wanted", "pass what return_lse=True gave beside it")
        _check_alike(f"outs[{p}]", out, "outs[0]", first_out)
        _check_alike(f"lses[{p}]", lse, "lses[0]", first_lse)
    return list(zip(out_parts, lse_parts, strict=True))


def _as_list(name: str, things: Any) -> list[Array]:
    """Each part as an array of floats."""
    if isinstance(things, (str, bytes)) or not isinstance(things, Iterable):
        wanted = "a sequence of arrays, one for each part, was wanted"
        fail(TypeError, CALL, f"{name} is {kind(things)}", wanted, f"pass {name} as a list")
    parts = [as_array(CALL, f"{name}[{p}]", thing) for p, thing in enumerate(things)]
    for p, part in enumerate(parts):
        if native(part.dtype) not in FLOATS:
            fix = f"pass {name}[{p}].astype(np.float32)"
            fail(TypeError, CALL, f"{name}[{p}] has dtype {part.dtype}", f"{ANY_FLOAT} was wanted", fix)
    return parts


def _check_alike(name: str, array: Array, first_name: str, first: Array) -> None:
    """The same shape and dtype."""
    if array.shape != first.shape:
        came = f"{name} has shape {array.shape} but {first_name} has {first.shape}"
        fail(ValueError, CALL, came, "parts of the same query rows were wanted", "make each part from the same query")
    if native(array.dtype) != native(first.dtype):
        came = f"{name} has dtype {array.dtype} but {first_name} has {first.dtype}"
        fail(TypeError, CALL, came, "parts of one dtype were wanted", f"pass {name}.astype(np.{native(first.dtype)})")
