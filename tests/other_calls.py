"""What attention calls that cannot run here compute, written out in NumPy and float64 from their documentation.

FlashAttention needs a GPU and ggml has no Python face.  test_coming_from.py compares ours with
these; it and test_coming_from_torch.py share the small arrays made here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
B, HQ, HKV, SQ, SK, D = 2, 4, 2, 5, 9, 8


def arrays(rng: np.random.Generator, heads: int = HKV, dtype: str = "float64") -> tuple[Array, Array, Array]:
    """query (B, HQ, SQ, D); key and value (B, heads, SK, D)."""
    query = rng.standard_normal((B, HQ, SQ, D)).astype(dtype)
    key, value = (rng.standard_normal((B, heads, SK, D)).astype(dtype) for _ in range(2))
    return query, key, value


def near(got: Any, wanted: Any, digits: float = 1e-11) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=digits, atol=digits)


def some_masked(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """True = masked; never all of a row."""
    masked = rng.random(shape) < 0.4
    masked[..., 2] = False
    return masked


def flash_attn(
    q: Array, k: Array, v: Array, *, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Array | None = None,
    cache_seqlens: Array | None = None, cache_leftpad: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """(out (B, S, H, D), lse (B, H, S)) as flash_attn_func and flash_attn_with_kvcache document it.

    "Query at position i will only attend to keys between [i + seqlen_k - seqlen_q - window_size[0],
    i + seqlen_k - seqlen_q + window_size[1]] inclusive"; ALiBi's bias is
    (-alibi_slope * |i + seqlen_k - seqlen_q - j|).
    """
    (batch, seqlen_q, heads, dim), whole = q.shape, k.shape[1]
    lengths = np.full(batch, whole) if cache_seqlens is None else cache_seqlens
    first = np.zeros(batch, int) if cache_leftpad is None else cache_leftpad
    i, j = np.arange(seqlen_q)[:, None], np.arange(whole)
    distance = j - (i + lengths[:, None, None, None] - seqlen_q)
    live = (j < lengths[:, None, None, None]) & (j >= first[:, None, None, None])
    left, right = window_size[0], 0 if causal else window_size[1]
    live = live & ((distance >= -left) if left >= 0 else True) & ((distance <= right) if right >= 0 else True)
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) * (dim**-0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    if alibi_slopes is not None:
        scores = scores - np.broadcast_to(alibi_slopes, (batch, heads))[..., None, None] * np.abs(distance)
    weights = np.where(live, np.exp(scores), 0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total), np.inf)
    out = np.einsum("bhij,bjhd->bihd", weights / np.where(total > 0, total, 1)[..., None], v)
    return out, lse


def ggml_slopes(heads: int, max_bias: float) -> Array:
    """ggml-cpu/ops.cpp: the mask is multiplied by a head's slope, or by 1 where max_bias is 0."""
    log2 = 1 << int(np.floor(np.log2(heads)))
    m0, m1 = 2.0 ** (-max_bias / log2), 2.0 ** (-max_bias / 2 / log2)
    slopes = [m0 ** (h + 1) if h < log2 else m1 ** (2 * (h - log2) + 1) for h in range(heads)]
    return np.array(slopes if max_bias > 0 else [1.0] * heads)


def ggml_flash_attn_ext(
    given: tuple[Array, ...], mask: Array | None = None, max_bias: float = 0.0, logit_softcap: float = 0.0,
    sinks: Array | None = None,
) -> Array:  # fmt: skip
    """(B, S, H, Dv): head h reads kv head h / (H / Hkv); softcap, then slope * mask, then the sink."""
    query, key, value = given
    key, value = (x[:, np.arange(query.shape[1]) // (query.shape[1] // x.shape[1])] for x in (key, value))
    scores = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
    scores = logit_softcap * np.tanh(scores / logit_softcap) if logit_softcap else scores
    if mask is not None:
        scores = scores + ggml_slopes(query.shape[1], max_bias)[:, None, None] * mask.astype(np.float64)
    weights = np.exp(scores)
    total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks)[:, None])
    return (weights / total[..., None] @ value).swapaxes(1, 2)
