"""Attention weights, in NumPy, for who wants to look at them.

Attention itself never forms them; only ``need_weights`` of module.py pays for this, after the call of
attention has checked every argument.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._messages import Array

Window = tuple[int | None, int | None]


def attention_weights(
    query: Array,
    key: Array,
    attn_mask: Array | None,
    *,
    is_causal: bool,
    scale: float | None,
    window: Window | None,
    softcap: float | None,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    kv_lengths: ArrayLike | None,
) -> Array:
    """softmax(scores), and exactly 0 in masked slots and in rows without keys, whatever lies there.

    Parameters
    ----------
    query : ndarray (..., Hq, Sq, D)
    key : ndarray (..., Hkv, Sk, D)
    attn_mask, is_causal, scale, window, softcap, alibi_slopes, sinks, kv_lengths
        As in :func:`gqa_ext.scaled_dot_product_attention`; the first row stands at the first key.

    Returns
    -------
    ndarray (..., Hq, Sq, Sk), query's dtype
    """
    distance = np.arange(key.shape[-2]) - np.arange(query.shape[-2])[:, None]
    live = _live(distance, is_causal, window, attn_mask, kv_lengths)
    with np.errstate(all="ignore"):  # masked slots may hold anything
        weights = _scores(query, key, scale, softcap)
        if attn_mask is not None and attn_mask.dtype != np.bool_:
            limits = np.finfo(weights.dtype)
            weights += np.clip(attn_mask.astype(np.float64), limits.min, limits.max).astype(weights.dtype)
        if alibi_slopes is not None:
            weights -= (np.asarray(alibi_slopes)[..., None, None] * np.abs(distance)).astype(weights.dtype)
        np.copyto(weights, -np.inf, where=~live)
        _softmax(weights, None if sinks is None else np.asarray(sinks, weights.dtype)[:, None, None])
    np.copyto(weights, 0, where=~live)  # beside NaN, too
    return weights


def _live(
    distance: Array, is_causal: bool, window: Window | None, attn_mask: Array | None, kv_lengths: ArrayLike | None
) -> Array:
    """Which slots (..., Sq, Sk) are not masked; distance (Sq, Sk) is p_j - p_i."""
    left, right = (math.inf if side is None else side for side in window or (None, None))
    live: Array = (distance >= -left) & (distance <= (min(right, 0) if is_causal else right))
    if kv_lengths is not None:
        live = live & (np.arange(distance.shape[-1]) < np.asarray(kv_lengths)[..., None, None, None])
    if attn_mask is not None:
        live = live & (attn_mask if attn_mask.dtype == np.bool_ else attn_mask != -np.inf)
    return live


def _scores(query: Array, key: Array, scale: float | None, softcap: float | None) -> Array:
    """scale * query @ key^T, capped, each key head beside the query heads that read it."""
    *_, num_heads, rows, head_dim = query.shape
    *_, num_kv_heads, keys, _ = key.shape
    groups = query.reshape(*query.shape[:-3], num_kv_heads, num_heads // num_kv_heads, rows, head_dim)
    scores = groups @ key[..., None, :, :].swapaxes(-1, -2)
    scores *= 1 / math.sqrt(head_dim) if scale is None else scale
    flat: Array = scores.reshape(*scores.shape[:-4], num_heads, rows, keys)
    return softcap * np.tanh(flat / softcap) if softcap else flat


def _softmax(scores: Array, sinks: Any) -> None:
    """In place, along the last axis; sinks (Hq, 1, 1) or None count in the sum."""
    least = -np.inf if sinks is None else sinks
    top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), least)
    top = np.where(top == -np.inf, 0, top)
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
    scores /= np.where(total == 0, 1, total)
