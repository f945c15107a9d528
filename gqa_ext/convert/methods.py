"""Fewer key/value heads from many: array maths only, no files, no architectures.

This module checks and prepares; csrc/convert.c reads the arrays where they lie and pools.
Called by users, by ``GroupedQueryAttention.from_mha`` and by whatever converts whole models.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._arguments import as_array, as_axis, as_int, as_kv_heads
from .._messages import fail, kind, native, short

__all__ = ["METHODS", "pool_heads"]

Array = NDArray[Any]

METHODS = ("mean", "first")
CALL = "pool_heads"
POOLED = tuple(np.dtype(scalar) for scalar in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def pool_heads(
    weight: ArrayLike,
    num_heads: int,
    num_kv_heads: int,
    *,
    method: str = "mean",
    axis: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """Pool the heads of one key or value projection, so that query heads can share them.

    Parameters
    ----------
    weight : array_like of float16, bfloat16, float32 or float64
        A projection of any number of dimensions whose `axis` has length ``num_heads * head_dim``, head after
        head: ``k_proj.weight`` (out, in) with axis 0, a transposed one (in, out) with axis 1, or a bias. Any
        strides and byte order; it is read in place and never written.
    num_heads : int
        Heads along `axis`.
    num_kv_heads : int
        Heads wanted; divides `num_heads`.
    method : {'mean', 'first'}
        'mean' is the mean of the group's heads, as in [1]_; 'first' keeps the first head of each group.
    axis : int
        The axis that holds the heads; negative ones count from the end.
    groups : sequence of sequences of int, optional
        ``groups[g]`` are the heads that become head g: a partition of ``range(num_heads)`` into `num_kv_heads`
        lists of equal length, in any order. None groups neighbours, as attention reads them:
        ``h // (num_heads // num_kv_heads)``.
    weights : array_like (num_heads,), optional
        How much each head counts in the mean of its group; normalised inside each group. A head of weight 0 is
        left out altogether, NaN or not. Negative ones are allowed, as in `numpy.average`.

    Returns
    -------
    ndarray
        `weight`'s dtype and shape, but ``num_kv_heads * head_dim`` along `axis`; C-contiguous, native byte order.

    Raises
    ------
    TypeError
        Another dtype, or an argument of another kind.
    ValueError
        A shape, a partition or weights that do not fit; weights of a group that sum to 0; weights beside
        another method than 'mean'.

    Notes
    -----
    Sums are taken in float64 and rounded once, straight to the dtype: float16, bfloat16 and float32 get the
    nearest number to the exact mean (ties to even), unless sums cancel over more than 100 binary orders of
    magnitude; float64 gets the float64 sum in the order of the group, divided by the number of heads. A sum
    that overflows float64 does not spoil the mean. A group of one head is copied bit for bit, so
    ``num_kv_heads == num_heads`` returns the same bits.

    References
    ----------
    .. [1] Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
       Checkpoints", 2023, https://arxiv.org/abs/2305.13245

    Examples
    --------
    >>> import numpy as np
    >>> from gqa_ext.convert import pool_heads
    >>> weight = np.array([[1.0], [3.0], [10.0], [30.0]], np.float32)  # 4 heads of head_dim 1
    >>> pool_heads(weight, 4, 2).ravel()
    array([ 2., 20.], dtype=float32)
    >>> pool_heads(weight, 4, 2, groups=[[0, 3], [2, 1]]).ravel()
    array([15.5,  6.5], dtype=float32)
    """
    array = as_weight(weight)
    num_heads = as_int(CALL, "num_heads", num_heads, 1)
    check_method(method, weights)
    axis = as_heads_axis(axis, array, num_heads)
    num_kv_heads = as_kv_heads(CALL, num_kv_heads, num_heads)
    members = as_members(groups, num_heads, num_kv_heads)
    shares = None if weights is None else as_shares(weights, members)
    if method == "first":
        members = np.ascontiguousarray(members[:, :1])
    shape = list(array.shape)
    shape[axis] = shape[axis] // num_heads * num_kv_heads
    out = np.empty(shape, native(array.dtype))
    return _core.pool_heads(array, out, axis, num_heads, members, shares)


def as_weight(weight: Any) -> Array:
    """One of the four dtypes; a masked array has no mean that a projection could use."""
    wanted = "float16, bfloat16, float32 or float64 was wanted"
    if isinstance(weight, np.ma.MaskedArray):
        fail(TypeError, CALL, "weight is a masked array", "a plain array was wanted", "pass weight.filled(0)")
    array = as_array(CALL, "weight", weight)
    if native(array.dtype) not in POOLED:
        fix = "pass weight.real or weight.imag" if array.dtype.kind == "c" else "pass weight.astype(np.float32)"
        fail(TypeError, CALL, f"weight has dtype {array.dtype}", wanted, fix)
    return array


def check_method(method: Any, weights: Any, call: str = CALL) -> None:
    """A method we know, and weights only where they mean something."""
    if not isinstance(method, str) or method not in METHODS:
        known = " or ".join(repr(name) for name in METHODS)
        fail(ValueError, call, f"method is {short(method)}", f"{known} was wanted", "pass method='mean'")
    if weights is not None and method != "mean":
        wanted = "weights go with method='mean' only"
        fail(ValueError, call, f"weights came with method={method!r}", wanted, "leave out one of them")


def as_heads_axis(axis: Any, weight: Array, num_heads: int) -> int:
    """A non-negative axis that is heads times head_dim long."""
    place = as_axis(CALL, axis, "weight", weight, "pass axis=0 for an (out, in) projection")
    length = weight.shape[place]
    if length % num_heads or not length:
        came = f"weight has length {length} along axis {place} for num_heads {num_heads}"
        wanted = f"num_heads * head_dim was wanted there (weight {weight.shape})"
        others = [i for i, n in enumerate(weight.shape) if n and n % num_heads == 0]
        fix = f"pass axis={others[0]} if the heads lie there" if others else "pass the number of heads in weight"
        fail(ValueError, CALL, came, wanted, fix)
    return place


def as_members(groups: Any, num_heads: int, num_kv_heads: int, call: str = CALL) -> NDArray[np.int64]:
    """(num_kv_heads, num_heads // num_kv_heads): the heads of each group; neighbours for None."""
    size = num_heads // num_kv_heads
    if groups is None:
        return np.arange(num_heads, dtype=np.int64).reshape(num_kv_heads, size)
    wanted = f"a partition of the heads 0 to {num_heads - 1} into {num_kv_heads} lists of {size} was wanted"
    fix = "leave groups out to pool neighbours"
    if isinstance(groups, (Mapping, str)) or not isinstance(groups, Iterable):
        fail(TypeError, call, f"groups is {kind(groups)}", wanted, fix)
    lists, ints = [], f"pass ints from 0 to {num_heads - 1}"
    for group in groups:
        if isinstance(group, (Mapping, str)) or not isinstance(group, Iterable):
            fail(TypeError, call, f"groups holds {kind(group)}", wanted, fix)
        lists.append([as_int(call, "a head in groups", head, 0, ints) for head in group])
    sizes = sorted({len(group) for group in lists})
    if len(lists) != num_kv_heads or sizes != [size]:
        fail(ValueError, call, f"groups has {len(lists)} lists of lengths {sizes}", wanted, fix)
    counts = np.bincount([head for group in lists for head in group if head < num_heads], minlength=num_heads)
    if (counts != 1).any():
        missing, twice = np.flatnonzero(counts == 0).tolist(), np.flatnonzero(counts > 1).tolist()
        outside = sorted({head for group in lists for head in group if head >= num_heads})
        parts = {"lacks": missing, "repeats": twice, "goes beyond the last head with": outside}
        came = "groups " + " and ".join(f"{what} {heads}" for what, heads in parts.items() if heads)
        fail(ValueError, call, came, wanted, fix)
    return np.array(lists, np.int64)


def as_shares(weights: Any, members: NDArray[np.int64], call: str = CALL) -> NDArray[np.float64]:
    """Weights as members lie, scaled group by group without rounding; C divides by their sum.

    Where the weights of a group are equal or 0 they become 1 or 0, so the plain mean of those heads results.
    """
    fix = f"pass {members.size} numbers, one for each head"
    array = as_array(call, "weights", weights)
    if array.dtype.kind not in "biuf" and native(array.dtype) not in POOLED:
        fail(TypeError, call, f"weights has dtype {array.dtype}", "real numbers were wanted", fix)
    if array.shape != (members.size,):
        fail(ValueError, call, f"weights has shape {array.shape}", f"(num_heads,) = ({members.size},) was wanted", fix)
    rows: NDArray[np.float64] = array.astype(np.float64)[members]
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(array.astype(np.float64))).tolist()
        fail(ValueError, call, f"weights is NaN or infinite for heads {bad}", "finite numbers were wanted", fix)
    rows = np.ldexp(rows, -np.frexp(np.abs(rows).max(axis=1, keepdims=True))[1])
    for row, heads in zip(rows, members, strict=True):
        total = math.fsum(row)
        if abs(total) <= row.size * np.finfo(np.float64).eps * np.abs(row).sum():
            came = f"weights of the group of heads {heads.tolist()} sum to 0"
            fail(ValueError, call, came, "weights that can be normalised were wanted", "give one of them more")
        row *= math.copysign(1, total)
        live = row[row != 0]
        if (live == live[0]).all():
            row[row != 0] = 1
    return rows
