"""Attention weights, in NumPy, for who wants to look at them.

Attention itself never forms them; only ``need_weights`` of module.py pays for this.
"""

import math

import numpy as np

from ._messages import Array


def attention_weights(query: Array, key: Array, attn_mask: Array | None, is_causal: bool, scale: float | None) -> Array:
    """softmax(scores), and exactly 0 in masked slots and in rows without keys, whatever lies there.

    Parameters
    ----------
    query : ndarray (..., Hq, Sq, D)
    key : ndarray (..., Hkv, Sk, D)
    attn_mask, is_causal, scale
        As in :func:`gqa_ext.scaled_dot_product_attention`; is_causal aligns the first row with the first key.

    Returns
    -------
    ndarray (..., Hq, Sq, Sk), query's dtype
    """
    with np.errstate(all="ignore"):  # masked slots may hold anything
        weights = _scores(query, key, scale)
        live: Array = np.tri(*weights.shape[-2:], dtype=bool) if is_causal else np.ones(weights.shape[-2:], bool)
        if attn_mask is not None and attn_mask.dtype == np.bool_:
            live = live & attn_mask
        elif attn_mask is not None:
            wide = attn_mask.astype(np.float64)
            limits = np.finfo(weights.dtype)
            live = live & (wide != -np.inf)
            weights += np.clip(wide, limits.min, limits.max).astype(weights.dtype)
        np.copyto(weights, -np.inf, where=~live)
        top = weights.max(axis=-1, keepdims=True, initial=-np.inf)
        weights -= np.where(top == -np.inf, 0, top)
        np.exp(weights, out=weights)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= np.where(total == 0, 1, total)
    np.copyto(weights, 0, where=~live)  # beside NaN, too
    return weights


def _scores(query: Array, key: Array, scale: float | None) -> Array:
    """scale * query @ key^T, each key head beside the query heads that read it."""
    *_, num_heads, rows, head_dim = query.shape
    *_, num_kv_heads, keys, _ = key.shape
    groups = query.reshape(*query.shape[:-3], num_kv_heads, num_heads // num_kv_heads, rows, head_dim)
    scores = groups @ key[..., None, :, :].swapaxes(-1, -2)
    scores *= 1 / math.sqrt(head_dim) if scale is None else scale
    flat: Array = scores.reshape(*scores.shape[:-4], num_heads, rows, keys)
    return flat
