"""Attention over packed sequences: no padding, one after the other in (T, H, D) arrays.

The arrays go to C transposed to (H, T, D), in place, with the places where sequences begin.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _arguments, _checks, _core
from ._docs import shared_docs
from ._messages import ANY_FLOAT, FLOATS, Array, fail, native, shapes
from ._rules import NO_RULES, Rules, as_integers, as_sinks, as_slopes, as_softcap, as_window, with_dropout

CALL = "varlen_attention"
# What names a slot by its place in a padded batch has no meaning here.
_DENSE = ("attn_mask", "query_lengths", "kv_lengths", "query_positions", "key_positions", "return_weights")


@shared_docs
def varlen_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike, *,
    is_causal: bool = False, scale: float | None = None, causal_alignment: str | None = None,
    window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None, dropout_p: float = 0.0, rng: Any = None,
    return_lse: bool = False, out: Array | None = None, **dense: Any,
) -> Any:  # fmt: skip
    """Attention of each of several packed sequences to itself, as in FlashAttention's ``flash_attn_varlen_func``.

    The same bits as a call of :func:`scaled_dot_product_attention` for each sequence alone.

    Parameters
    ----------
    query : array_like, (Tq, Hq, D), float16, bfloat16, float32 or float64
        Rows of all sequences, one after the other. Any strides and byte order are read in place.
    key, value : array_like, (Tk, Hkv, D) and (Tk, Hkv, Dv), any of these dtypes
        float64 goes only with float64.
    cu_seqlens_q, cu_seqlens_k : array_like of int, (B + 1,)
        Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; the first is 0. Lengths may be 0, and those of
        queries and keys may differ. Rows of query past the last offset give 0 and an LSE of -inf.
    is_causal, scale, causal_alignment, window, softcap, sinks, dropout_p, rng, out
        As in :func:`scaled_dot_product_attention`; None aligns upper left (FlashAttention: lower right).
    alibi_slopes : array_like, (Hq,) or (B, Hq), optional
    return_lse : bool
        Also return the LSE.

    Returns
    -------
    out : ndarray, (Tq, Hq, Dv)
        In query's dtype.
    lse : ndarray, (Tq, Hq)
        With ``return_lse`` only; float32, or float64 beside float64.

    {raises}

    Examples
    --------
    >>> query = key = value = np.ones((7, 8, 64), np.float32)  # three sequences, of 2, 0 and 5 rows
    >>> varlen_attention(query, key, value, [0, 2, 2, 7], [0, 2, 2, 7], is_causal=True).shape
    (7, 8, 64)
    """
    refuse_dense(dense)
    named = (("query", query), ("key", key), ("value", value))
    arrays = [_arguments.as_array(CALL, name, thing) for name, thing in named]
    check_packed(*arrays)
    q_starts = as_starts("cu_seqlens_q", cu_seqlens_q, arrays[0])
    k_starts = as_starts("cu_seqlens_k", cu_seqlens_k, arrays[1])
    if len(q_starts) != len(k_starts):
        came = f"cu_seqlens_k has {len(k_starts)} offsets but cu_seqlens_q has {len(q_starts)}"
        fail(ValueError, CALL, came, "as many were wanted", "give every sequence an offset in both, also an empty one")
    heads, sequences = arrays[0].shape[1], len(q_starts) - 1
    left, right = (None, None) if window is None else as_window(CALL, window)
    rules = with_dropout(NO_RULES, dropout_p, rng, CALL)._replace(
        left=left, right=right,
        softcap=0.0 if softcap is None else as_softcap(CALL, softcap, arrays[0].dtype),
        alibi_slopes=None if alibi_slopes is None else packed_slopes(alibi_slopes, sequences, heads),
        sinks=None if sinks is None else as_sinks(CALL, sinks, heads),
        cu_seqlens_q=q_starts, cu_seqlens_k=k_starts)  # fmt: skip
    options = (
        _arguments.as_flag(CALL, "is_causal", is_causal),
        _arguments.is_lower_right(causal_alignment, False, arrays[0], arrays[1], CALL),
        None if scale is None else _arguments.as_scale(CALL, scale, arrays[0].dtype),
    )
    wants_lse = _arguments.as_flag(CALL, "return_lse", return_lse)
    result, lse = _attend(arrays, options, rules, out)
    return (result, lse) if wants_lse else result


def _attend(
    arrays: list[Array], options: tuple[bool, bool, float | None], rules: Rules, out: Array | None
) -> tuple[Array, Array]:
    """The call itself, with the LSE; rows past the last offset belong to no sequence."""
    query, _, value = arrays
    shape, dtype, fix = (*query.shape[:2], value.shape[2]), native(query.dtype), "pass fewer rows or heads at once"
    target = _arguments.room(CALL, "out", shape, dtype, fix) if out is None else _arguments.as_out(out, CALL)
    _checks.check_out(target, shape, query, CALL)
    clash = any(_arguments.overlap(target, array) for array in arrays)
    written = np.empty(shape, dtype) if clash else target
    q, k, v, o = (array.transpose(1, 0, 2) for array in (*arrays, written))
    lse: Array = np.ascontiguousarray(_core.attention(q, k, v, None, *options, True, rules, o, True)[1].T)
    if rules.cu_seqlens_q is not None:
        written[rules.cu_seqlens_q[-1] :] = 0
        lse[rules.cu_seqlens_q[-1] :] = -np.inf
    if clash:
        target[...] = written
    return (target if out is None else out), lse


def refuse_dense(dense: dict[str, Any]) -> None:
    """Rules of padded batches raise, and so does a name that no call knows."""
    for name, thing in dense.items():
        if name not in _DENSE:
            raise TypeError(f"{CALL}() got an unexpected keyword argument {name!r}")
        if thing is not None and thing is not False:
            wanted = "packed sequences have no padded slots that it could name"
            fix = "leave it out, or call scaled_dot_product_attention on a padded batch"
            fail(ValueError, CALL, f"{name} is given", wanted, fix)


def check_packed(query: Array, key: Array, value: Array) -> None:
    """Three (T, H, D) arrays that fit each other."""
    where = shapes(query=query, key=key, value=value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if native(array.dtype) not in FLOATS:
            came = f"{name} has dtype {array.dtype}"
            fail(TypeError, CALL, came, f"{ANY_FLOAT} was wanted", f"pass {name}.astype(np.float32)")
        if array.ndim != 3:
            came = f"{name} has {array.ndim} dimensions"
            wanted = f"(T, heads, head_dim) was wanted ({where})"
            fail(ValueError, CALL, came, wanted, "put the rows of all sequences one after the other")
    if len({native(array.dtype) == np.float64 for array in (query, key, value)}) > 1:
        came = f"query is {query.dtype}, key {key.dtype} and value {value.dtype}"
        fail(TypeError, CALL, came, "float64 goes only with float64", "pass all three as float32")
    if query.shape[2] != key.shape[2] or query.shape[2] == 0 or key.shape[:2] != value.shape[:2]:
        wanted = "query and key must share head_dim, key and value rows and heads"
        fail(ValueError, CALL, f"the shapes are {where}", wanted, "pass (T, heads, head_dim) arrays that do")
    _checks.check_ratio(query.shape[1], key.shape[1], where, CALL)


def as_starts(name: str, thing: Any, rows: Array) -> Array:
    """Offsets that rise from 0 to at most the number of rows."""
    starts = np.ascontiguousarray(as_integers(CALL, name, thing))
    wanted = f"offsets (B + 1,) that rise from 0 to at most {rows.shape[0]} rows were wanted"
    fix = f"pass {name}=np.concatenate([[0], np.cumsum(lengths)])"
    if starts.ndim != 1 or not starts.size:
        fail(ValueError, CALL, f"{name} has shape {starts.shape}", wanted, fix)
    if starts[0] != 0 or starts[-1] > rows.shape[0] or (np.diff(starts) < 0).any():
        fail(ValueError, CALL, f"{name} is {np.array2string(starts, threshold=8)}", wanted, fix)
    return starts


def packed_slopes(thing: Any, sequences: int, heads: int) -> Array:
    """(Hq,), or (B, Hq) with a row for each sequence."""
    slopes = as_slopes(CALL, thing)
    if slopes.shape not in ((heads,), (sequences, heads), (1, heads)):
        wanted = f"({heads},) or ({sequences}, {heads}) was wanted"
        fail(ValueError, CALL, f"alibi_slopes has shape {slopes.shape}", wanted, "pass a slope for each query head")
    return slopes
