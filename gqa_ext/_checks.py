"""What an argument must be, in words: each function raises the message for one thing that C would refuse.

_explain.py asks all of them once a call has failed; packed and paged calls, rope and the layer ask some before they
begin, where they can say more than C's status would.
"""

from typing import Any

import numpy as np

from ._messages import (
    ATTENTION,
    FLOATS,
    Array,
    count,
    divisors,
    fail,
    fits,
    heads,
    kind,
    native,
    one_of,
    shapes,
)

DOUBLE = FLOATS[-1:]


def check_array(call: str, name: str, array: Any) -> None:
    """Only exact ndarrays go to C; the callers convert everything else first."""
    if type(array) is not np.ndarray:
        fail(TypeError, call, f"{name} is {kind(array)}", "an ndarray was wanted", f"pass np.asarray({name})")


def check_dtype(
    name: str, array: Array, call: str = ATTENTION, among: tuple[np.dtype[Any], ...] = FLOATS, why: str = ""
) -> None:
    """One of the four float dtypes, or of fewer and why."""
    dtype = native(array.dtype)
    if dtype in among:
        return
    if dtype.kind == "c":
        fix = f"it is not defined for complex numbers; pass {name}.real or {name}.imag"
    elif dtype.kind in "?biuf" or dtype in FLOATS:
        fix = f"pass {name}.astype(np.{'float64' if among == DOUBLE else 'float32'})"
    else:
        fix = "pass an array of floating-point numbers"
    fail(TypeError, call, f"{name} has dtype {dtype}", f"{one_of(among)} was wanted{why}", fix)


def check_same_precision(call: str, **arrays: Array) -> None:
    """float64 goes only with float64, the others in any mix."""
    types = {name: native(array.dtype) for name, array in arrays.items()}
    odd = [name for name, dtype in types.items() if dtype != np.float64]
    if 0 < len(odd) < len(types):
        came = ", ".join(f"{name} is {dtype}" for name, dtype in types.items())
        fix = f"pass {odd[0]}.astype(np.float64), or {'both' if len(types) == 2 else 'all three'} as float32"
        fail(TypeError, call, came, "float64 goes only with float64", fix)


def check_rank(name: str, array: Array) -> None:
    """(S, D), (H, S, D) or (..., H, S, D)."""
    if array.ndim < 2:
        fix = f"pass {name}[None, :] for a single row" if array.ndim else "pass an array of rows"
        wanted = f"at least the dimensions (sequence, head_dim) were wanted ({shapes(**{name: array})})"
        fail(ValueError, ATTENTION, f"{name} has {count(array.ndim, 'dimension')}", wanted, fix)


def check_head_dim(query: Array, key: Array) -> None:
    """query and key share head_dim; value's may differ."""
    q_dim, k_dim = query.shape[-1], key.shape[-1]
    where = shapes(query=query, key=key)
    if q_dim != k_dim:
        wanted = f"query and key must have the same last dimension ({where})"
        fix = "slice or project one of them"
        if key.shape[-2] == q_dim:
            fix = "key is (..., sequence, head_dim), not transposed; pass key.swapaxes(-1, -2)"
        fail(ValueError, ATTENTION, f"key has head_dim {k_dim} but query has {q_dim}", wanted, fix)
    if q_dim == 0:
        wanted = f"at least 1 was wanted ({where})"
        fail(ValueError, ATTENTION, "query and key have head_dim 0", wanted, "pass arrays with a last dimension")


def check_sequence(key: Array, value: Array) -> None:
    """key and value are one sequence."""
    k_len, v_len = key.shape[-2], value.shape[-2]
    if k_len != v_len:
        wanted = f"each key needs its value ({shapes(key=key, value=value)})"
        fix = f"pass the same {min(k_len, v_len)} positions of both, as (..., sequence, head_dim)"
        fail(ValueError, ATTENTION, f"value has {count(v_len, 'row')} but key has {k_len}", wanted, fix)


def check_heads(query: Array, key: Array, value: Array, enable_gqa: bool) -> None:
    """Hq % Hkv == 0, or equal heads where grouping is switched off."""
    hq, hk, hv = heads(query), heads(key), heads(value)
    where = shapes(query=query, key=key)
    if hk != hv:
        wanted = f"key and value must have the same number of heads ({shapes(key=key, value=value)})"
        fix = "pass them as (..., heads, sequence, head_dim) with equal heads"
        fail(ValueError, ATTENTION, f"value has {count(hv, 'head')} but key has {hk}", wanted, fix)
    if not enable_gqa and hq != hk:
        wanted = f"without grouping the heads must be equal, or 1 ({where})"
        came = f"key has {count(hk, 'head')} but query has {hq} and enable_gqa is False"
        fail(ValueError, ATTENTION, came, wanted, "pass enable_gqa=True")
    check_ratio(hq, hk, where)


def check_ratio(q_heads: int, k_heads: int, where: str, call: str = ATTENTION) -> None:
    """Each key head is read by equally many query heads."""
    if q_heads != k_heads and (k_heads == 0 or q_heads % k_heads):
        came = f"key has {count(k_heads, 'head')} but query has {q_heads}"
        wanted = f"query heads must be a multiple of key heads ({where})"
        fail(ValueError, call, came, wanted, f"pass key and value with one of {divisors(q_heads)} heads")


def output_shape(query: Array, key: Array, value: Array) -> tuple[int, ...]:
    """(..., Hq, Sq, Dv) over the broadcast leading dimensions."""
    try:
        leading = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except ValueError:
        came = f"query has batch dimensions {query.shape[:-3]}, key {key.shape[:-3]} and value {value.shape[:-3]}"
        where = shapes(query=query, key=key, value=value)
        wanted = f"the dimensions before (heads, sequence, head_dim) must be equal or 1 ({where})"
        fail(ValueError, ATTENTION, came, wanted, "give all three the same batch, or 1 where one is shared")
    most = max(query.ndim, key.ndim, value.ndim)
    inner = (heads(query),) if most > 2 else ()
    return (*leading, *inner, query.shape[-2], value.shape[-1])


def check_mask(mask: Any, target: tuple[int, ...], call: str = ATTENTION) -> None:
    """bool or float, broadcasting to (..., Hq, Sq, Sk)."""
    check_array(call, "attn_mask", mask)
    dtype = native(mask.dtype)
    if dtype != np.bool_ and dtype not in FLOATS:
        fix = "pass attn_mask.astype(bool), True where a key may be seen"
        if dtype.kind not in "iu":
            fix = "pass bool (True where a key may be seen) or float32 (added to the scores)"
        wanted = f"bool, {one_of(FLOATS)} was wanted"
        fail(TypeError, call, f"attn_mask has dtype {dtype}", wanted, fix)
    if not fits(mask.shape, target):
        wanted = f"it must broadcast to (..., query heads, query rows, key rows) {target} and not widen it"
        fail(ValueError, call, f"attn_mask has shape {mask.shape}", wanted, mask_fix(mask, target))


def mask_fix(mask: Array, target: tuple[int, ...]) -> str:
    """The indexing that makes the mask fit, if a usual one does."""
    for index, text in (
        ((slice(None), None), "attn_mask[:, None]"),
        ((slice(None), None, None), "attn_mask[:, None, None]"),
    ):
        if mask.ndim + len(index) - 1 == len(target) and fits(mask[index].shape, target):
            return f"pass {text}"
    if mask.ndim > 1 and fits(mask.swapaxes(-1, -2).shape, target):
        return "pass attn_mask.swapaxes(-1, -2), rows are queries"
    return "pass a mask of that shape, or with 1 in any place"


def check_spread(
    name: str, array: Array, target: tuple[int, ...], wanted: str, fix: str, call: str = ATTENTION
) -> None:
    """Broadcasts to the target without widening it."""
    if not fits(array.shape, target):
        fail(ValueError, call, f"{name} has shape {array.shape}", wanted, fix)


def check_lengths(
    name: str, lengths: Array, leading: tuple[int, ...], rows: str, most: int, where: str, call: str = ATTENTION
) -> None:
    """One for each sequence, and none longer than the array."""
    wanted = f"one length for each sequence was wanted, broadcasting to {leading} {where}"
    fix = f"pass shape {leading}" if leading else "pass one int"
    check_spread(name, lengths, leading, wanted, fix, call)
    bad = np.argwhere((lengths < 0) | (lengths > most))
    if len(bad):
        at = f"[{', '.join(map(str, bad[0]))}]" if lengths.ndim else ""
        came = f"{name}{at} is {lengths[tuple(bad[0])]}"
        wanted = f"from 0 to the number of {rows}, {most}, was wanted {where}"
        fail(ValueError, call, came, wanted, f"pass {name}.clip(0, {most}), or longer arrays")


def check_out(out: Any, shape: tuple[int, ...], query: Array, call: str = ATTENTION, name: str = "query") -> None:
    """Exactly the result's shape and dtype, and writable."""
    dtype = native(query.dtype)
    fix = f"pass np.empty({shape}, np.{dtype})"
    check_array(call, "out", out)
    if out.shape != shape:
        fail(ValueError, call, f"out has shape {out.shape}", f"{shape} was wanted", fix)
    if native(out.dtype) != dtype:
        fail(TypeError, call, f"out has dtype {out.dtype}", f"{name}'s dtype {dtype} was wanted", fix)
    if not out.flags.writeable:
        fail(ValueError, call, "out is read-only", "an array that can be written was wanted", fix)
