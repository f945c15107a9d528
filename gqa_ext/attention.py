"""The attention call and two small helpers around grouped heads.

Python converts and C computes: :func:`scaled_dot_product_attention` looks at the type of each argument,
hands the odd ones to _arguments.py, and makes one call.  A usual call is well under a microsecond here.
"""

import math
from typing import Any, TypeAlias

import ml_dtypes  # noqa: F401  makes "bfloat16" a name that np.dtype knows
import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, DTypeLike

from . import _arguments, _checks, _core, _messages
from ._docs import shared_docs
from ._messages import ATTENTION, Array, fail, native
from ._rules import NO_RULES, Rules, as_rules, with_dropout

# query, key, value, attn_mask, is_causal, lower_right, scale, enable_gqa, rules
Problem: TypeAlias = tuple[Array, Array, Array, Array | None, bool, bool, float | None, bool, Rules | None]


@shared_docs
def scaled_dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = True, *,
    causal_alignment: str | None = None, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, alibi_slopes: ArrayLike | None = None, sinks: ArrayLike | None = None,
    query_lengths: ArrayLike | None = None, kv_lengths: ArrayLike | None = None,
    query_positions: ArrayLike | None = None, key_positions: ArrayLike | None = None,
    return_lse: bool = False, return_weights: bool = False, rng: Any = None, out: Array | None = None,
) -> Any:  # fmt: skip
    """softmax(scale * query @ key^T + mask) @ value, for grouped heads (GQA, arXiv:2305.13245).

    Arguments, order and meaning are those of ``torch.nn.functional.scaled_dot_product_attention``; the others
    are rules of models and batches, in any combination. The score of row i and key j is made in this order:
    scale, softcap, float mask, ALiBi; then what any rule masks is dropped.

    Parameters
    ----------
    {query_key_value}
    {attn_mask}
    dropout_p : float
        Each weight becomes 0 with this probability and is divided by 1 - dropout_p otherwise; which ones, is a
        function of (seed, sequence, head, row, key) only. The LSE does not change. Always applied, as in torch.
    is_causal : bool
        Row i sees no later key, p_j <= p_i. Both apply beside attn_mask. UserWarning if Sq != Sk and neither an
        alignment nor query_positions is given.
    scale : float, optional
        Default 1 / sqrt(D). Finite, and where sums are made in float32 a size that it holds: 0, or 1.2e-38 to 3.4e38.
    enable_gqa : bool
        False (torch's default): heads broadcast like any dimension, so they must be equal or 1.
    {rules}
    {out}

    {raises}

    Examples
    --------
    >>> query, key, value = np.ones((8, 5, 64)), np.ones((2, 5, 64)), np.ones((2, 5, 64))
    >>> scaled_dot_product_attention(query, key, value, is_causal=True).shape
    (8, 5, 64)

    A sliding window of three keys, and a batch of which the second sequence has two keys only:

    >>> scaled_dot_product_attention(query, key, value, is_causal=True, window=(2, None)).shape
    (8, 5, 64)
    >>> batch = [np.stack([array, array]) for array in (query, key, value)]
    >>> scaled_dot_product_attention(*batch, kv_lengths=[5, 2], return_lse=True)[1].shape
    (2, 8, 5)
    """
    if not (type(query) is type(key) is type(value) is ndarray):
        query, key, value = _arguments.as_arrays(query=query, key=key, value=value)
    if attn_mask is not None:
        attn_mask = _arguments.as_mask(attn_mask)
    if scale is not None:
        scale = _arguments.as_scale(ATTENTION, scale, query.dtype)
    if not (type(is_causal) is type(enable_gqa) is type(return_lse) is bool):
        is_causal, enable_gqa, return_lse = _arguments.as_flags(
            is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)  # fmt: skip
    lower_right = _arguments.is_lower_right(causal_alignment, is_causal and query_positions is None, query, key)
    if not enable_gqa:
        query, key, value = _arguments.share_heads(query, key, value)
    rules = None
    if not (window is None and softcap is alibi_slopes is sinks is query_lengths is kv_lengths is query_positions
            is key_positions is None):  # fmt: skip
        rules = as_rules(
            query, causal_alignment, window, softcap, alibi_slopes, sinks, query_lengths=query_lengths,
            kv_lengths=kv_lengths, query_positions=query_positions, key_positions=key_positions)  # fmt: skip
    weights = None
    if not (rng is None and type(dropout_p) is float and dropout_p == 0.0 and return_weights is False):
        wanted = _arguments.as_flag(_messages.ATTENTION, "return_weights", return_weights)
        weights = _room_for_weights(query, key, value) if wanted else None
        rules = with_dropout(rules or NO_RULES, dropout_p, rng)._replace(weights=weights)
    problem = (query, key, value, attn_mask, is_causal, lower_right, scale, enable_gqa, rules)
    result = _core.attention(*problem, None, return_lse) if out is None else attend_into(out, problem, return_lse)
    if weights is None:
        return result
    return (*result, weights) if return_lse else (result, weights)


def _room_for_weights(query: Array, key: Array, value: Array) -> Array | None:
    """Zeros (..., Hq, Sq, Sk) for C to write to; None where the shapes do not fit, which C will say."""
    try:
        shape = (*_checks.output_shape(query, key, value)[:-1], key.shape[-2])
    except (ValueError, IndexError):
        return None
    return room_for_weights(ATTENTION, shape, query)


def room_for_weights(call: str, shape: tuple[int, ...], query: Array) -> Array:
    """Zeros of that shape, exact as the LSE."""
    dtype = np.float64 if query.dtype.itemsize == 8 else np.float32
    return _arguments.room(call, "weights", shape, dtype, "leave them out, or pass fewer rows at once", np.zeros)


def attend_into(out: Array, problem: Problem, return_lse: bool, call: str = ATTENTION) -> Any:
    """The call with ``out``, which comes back itself, whatever subclass of ndarray it is.

    Rules are copies, so they never lie in the same place.
    """
    query, key, value, mask = problem[:4]
    target = _arguments.as_out(out, call)
    clash = _arguments.clashes(target, query, key, value, mask)
    result = _core.attention(*problem, None if clash else target, return_lse)
    if clash:
        fresh = result[0] if return_lse else result
        _checks.check_out(target, fresh.shape, query, call)
        target[...] = fresh
    return (out, result[1]) if return_lse else out


def repeat_kv(x: ArrayLike, n_rep: int, axis: int = -3) -> Array:
    """Give each query head of a group its own copy of the key or value head that it reads.

    What grouped attention makes unnecessary, and other attention code wants: Hugging Face's function of
    this name and torch's ``repeat_interleave`` (head g becomes heads g * n_rep to (g + 1) * n_rep - 1).

    Parameters
    ----------
    x : array_like, (..., Hkv, S, D), any dtype
    n_rep : int
        Query heads per group, at least 1.
    axis : int
        The axis of heads.

    Returns
    -------
    ndarray, (..., Hkv * n_rep, S, D)
        A copy, also for ``n_rep=1``; C-contiguous, native byte order.

    Raises
    ------
    ValueError
        n_rep below 1, or no such axis.
    TypeError
        n_rep or axis is no int, or x is a masked array.

    Examples
    --------
    >>> repeat_kv(np.array([[[1.0]], [[2.0]]]), 2)[:, 0, 0]
    array([1., 1., 2., 2.])
    """
    array = _arguments.as_array("repeat_kv", "x", x)
    times = _arguments.as_int("repeat_kv", "n_rep", n_rep, least=1)
    fix = "pass x as (..., heads, S, D), or another axis"
    where = _arguments.as_axis("repeat_kv", axis, "x", array, fix)
    try:
        repeated = np.repeat(array, times, axis=where)
    except (OverflowError, ValueError):
        wanted = f"a result that NumPy can address was wanted (x {array.shape})"
        fail(ValueError, "repeat_kv", f"n_rep is {times}", wanted, "pass the query heads per group")
    return repeated.astype(native(array.dtype), order="C", copy=False)


def kv_cache_nbytes(
    batch: int, seq_len: int, num_kv_heads: int, head_dim: int, *, num_layers: int = 1, dtype: DTypeLike = "float16"
) -> int:
    """Bytes of the keys and values that a decoder keeps: 2 * layers * batch * seq_len * heads * head_dim * itemsize.

    Parameters
    ----------
    batch, seq_len, num_kv_heads, head_dim, num_layers : int
        At least 0. heads is what GQA shrinks: Hkv, not Hq.
    dtype : dtype or its name
        "bfloat16" and the other ml_dtypes are known; int8 counts the numbers, not their scales.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        A negative number.
    TypeError
        A number that is no int, or no such dtype.

    Examples
    --------
    Llama 3 8B with 8192 tokens, in GiB:

    >>> kv_cache_nbytes(1, 8192, 8, 128, num_layers=32, dtype="bfloat16") / 2**30
    1.0
    """
    call = "kv_cache_nbytes"
    numbers = {"batch": batch, "seq_len": seq_len, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    counts = [_arguments.as_int(call, name, n, least=0) for name, n in (*numbers.items(), ("num_layers", num_layers))]
    return 2 * math.prod(counts) * _arguments.as_dtype(call, "dtype", dtype).itemsize
