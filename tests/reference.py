"""The oracle: the whole score stage of attention in float64, as plainly as it can be said.

Imports nothing of the package under test.  Every other test that compares numbers compares
them with this; tests/test_reference.py compares this with torch.

Terms: Sq query rows i, Sk keys j, query head h of Hq reads key/value head h // (Hq // Hkv).
The score of (i, j), in this order:

    s = scale * q . k
    s = softcap * tanh(s / softcap)
    s += float mask
    s -= slope * |p_i - p_j|
    dropped by selection where masked, so that nothing a dropped slot holds can matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Head:
    """One query head of one sequence, all float64: what bounds.py needs to say how wrong an answer may be."""

    live: Array  # (Sq, Sk) bool: not masked
    scores: Array  # (Sq, Sk), -inf where not live
    magnitude: Array  # (Sq, Sk) sum of the absolute values of all that was added up in a score, 0 where not live
    weights: Array  # (Sq, Sk)
    value: Array  # (Sk, Dv)
    out: Array  # (Sq, Dv)
    lse: Array  # (Sq,)


@dataclass(frozen=True)
class Attention:
    """out (..., Hq, Sq, Dv), lse (..., Hq, Sq), weights (..., Hq, Sq, Sk), all float64."""

    out: Array
    lse: Array
    weights: Array


@dataclass(frozen=True)
class Problem:
    """One call, its arguments named as in scaled_dot_product_attention; nothing is validated."""

    query: Array
    key: Array
    value: Array
    attn_mask: Array | None = None
    is_causal: bool = False
    scale: float | None = None
    causal_alignment: str | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi_slopes: ArrayLike | None = None  # (Hq,) or (..., Hq)
    sinks: ArrayLike | None = None  # (Hq,)
    query_lengths: ArrayLike | None = None
    kv_lengths: ArrayLike | None = None
    query_positions: ArrayLike | None = None
    key_positions: ArrayLike | None = None

    @property
    def ndim(self) -> int:
        return max(self.query.ndim, self.key.ndim, self.value.ndim)

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions before the heads."""
        return np.broadcast_shapes(*(x.shape[:-3] for x in (self.query, self.key, self.value)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., Hq, Sq, Sk) with at least the heads."""
        q, k = _with_heads(self.query), _with_heads(self.key)
        return (*self.leading, q.shape[-3], q.shape[-2], k.shape[-2])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output that the call gives; the LSE has the same less the last."""
        shape = (*self.shape[:-1], self.value.shape[-1])
        return shape[1:] if self.ndim == 2 else shape

    @property
    def limit(self) -> float:
        """Largest finite number of the type that scores are computed in."""
        return float(np.finfo(np.float64).max) if self.query.dtype == np.float64 else FLOAT32_MAX

    def heads(self) -> Iterator[tuple[tuple[int, ...], Head]]:
        """Index (..., h) and contents of every query head."""
        group = self.shape[-3] // max(1, _with_heads(self.key).shape[-3])
        query, key, value = (self._leading_of(x) for x in (self.query, self.key, self.value))
        for index in np.ndindex(*self.shape[:-2]):
            *batch, h = index
            q = _double(query[(*batch, h)])
            k = _double(key[(*batch, h // group)])
            v = _double(value[(*batch, h // group)])
            yield index, self._head(index, q, k, v)

    def attention(self) -> Attention:
        """All heads together, in the shape that the call has."""
        *leading, num_heads, seq_q, seq_k = self.shape
        out = np.zeros((*leading, num_heads, seq_q, self.value.shape[-1]))
        lse = np.zeros((*leading, num_heads, seq_q))
        weights = np.zeros((*leading, num_heads, seq_q, seq_k))
        for index, head in self.heads():
            out[index], lse[index], weights[index] = head.out, head.lse, head.weights
        if self.ndim == 2:
            out, lse, weights = out[0], lse[0], weights[0]
        return Attention(out, lse, weights)

    def _leading_of(self, x: Array) -> Array:
        x = _with_heads(x)
        return np.broadcast_to(x, (*self.leading, *x.shape[-3:]))

    def _per_sequence(self, x: ArrayLike | None, batch: tuple[int, ...], tail: tuple[int, ...], default: Any) -> Any:
        """x, which broadcasts to (..., *tail), for one sequence."""
        return default if x is None else np.broadcast_to(np.asarray(x), (*self.leading, *tail))[batch]

    def _head(self, index: tuple[int, ...], q: Array, k: Array, v: Array) -> Head:
        with np.errstate(all="ignore"):
            live, present = self._live(index)
            scores, magnitude = self._scores(index, q, k)
            magnitude = np.where(live, magnitude, 0.0)
            # A score past the range of the computing type is an infinity there.
            scores = np.where(np.abs(scores) >= self.limit * (1 + 2.0**-25), np.copysign(np.inf, scores), scores)
            scores = np.where(live, scores, -np.inf)
            weights, lse = self._softmax(index, scores, live, present)
            return Head(live, scores, magnitude, weights, v, _weigh(weights, live, v), lse)

    def _positions(self, batch: tuple[int, ...]) -> tuple[Array, Array, int, int]:
        """p_i (Sq,), p_j (Sk,) and the two lengths of one sequence."""
        seq_q, seq_k = self.shape[-2:]
        query_length = int(self._per_sequence(self.query_lengths, batch, (), seq_q))
        kv_length = int(self._per_sequence(self.kv_lengths, batch, (), seq_k))
        first = kv_length - query_length if self.causal_alignment == "lower_right" else 0
        p_i = self._per_sequence(self.query_positions, batch, (seq_q,), np.arange(seq_q) + first)
        p_j = self._per_sequence(self.key_positions, batch, (seq_k,), np.arange(seq_k))
        return p_i.astype(np.int64), p_j.astype(np.int64), query_length, kv_length

    def _live(self, index: tuple[int, ...]) -> tuple[Array, Array]:
        """Which slots (Sq, Sk) a row attends to, and which rows (Sq,) are there at all."""
        seq_q, seq_k = self.shape[-2:]
        p_i, p_j, query_length, kv_length = self._positions(index[:-1])
        distance = p_j[None, :] - p_i[:, None]
        live = np.broadcast_to(np.arange(seq_k) < kv_length, (seq_q, seq_k)).copy()
        if self.key_positions is not None:
            live &= p_j >= 0
        if self.is_causal:
            live &= distance <= 0
        if self.window is not None:
            left, right = self.window
            if left is not None:
                live &= distance >= -left
            if right is not None:
                live &= distance <= right
        mask = self._mask(index)
        if mask is not None:
            live &= mask if mask.dtype == np.bool_ else mask != -np.inf
        present = np.arange(seq_q) < query_length
        return live & present[:, None], present

    def _mask(self, index: tuple[int, ...]) -> Array | None:
        """attn_mask for one head (Sq, Sk); a finite value past the computing type's range is clamped to it."""
        if self.attn_mask is None:
            return None
        mask = np.broadcast_to(self.attn_mask, self.shape)[index]
        if mask.dtype == np.bool_:
            return mask
        mask = _double(mask)
        return np.where(np.isfinite(mask), np.clip(mask, -self.limit, self.limit), mask)

    def _scores(self, index: tuple[int, ...], q: Array, k: Array) -> tuple[Array, Array]:
        """Finished scores and their magnitude (Sq, Sk), nothing dropped yet."""
        scale = 1.0 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        scores = scale * (q @ k.T)
        magnitude = abs(scale) * (np.abs(q) @ np.abs(k).T)
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        mask = self._mask(index)
        if mask is not None and mask.dtype != np.bool_:
            scores = scores + mask
            magnitude = magnitude + np.abs(mask)
        if self.alibi_slopes is not None:
            slope = float(np.broadcast_to(np.asarray(self.alibi_slopes), self.shape[:-2])[index])
            p_i, p_j, _, _ = self._positions(index[:-1])
            bias = slope * np.abs(p_i[:, None] - p_j[None, :]).astype(np.float64)
            scores = scores - bias
            magnitude = magnitude + np.abs(bias)
        return scores, magnitude

    def _softmax(self, index: tuple[int, ...], scores: Array, live: Array, present: Array) -> tuple[Array, Array]:
        """Weights (Sq, Sk) and LSE (Sq,)."""
        sink = -np.inf if self.sinks is None else float(np.asarray(self.sinks)[index[-1]])
        sinks = np.where(present, sink, -np.inf)
        top = np.maximum(scores.max(axis=-1, initial=-np.inf), sinks)
        # An empty row has top -inf: shifted by 0, its exponentials are all 0.
        shift = np.where(np.isfinite(top), top, 0.0)
        weights = np.exp(scores - shift[:, None])
        total = weights.sum(axis=-1) + np.exp(sinks - shift)
        lse = shift + np.log(total)
        weights = weights / np.where(total == 0, 1.0, total)[:, None]
        broken = np.isnan(top) | (top == np.inf)
        weights = np.where(broken[:, None] & live, np.nan, np.where(live, weights, 0.0))
        return weights, np.where(broken, np.nan, lse)


def attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, attn_mask: Any = None, **rules: Any) -> Attention:
    """Scaled dot product attention in float64, as Problem(...).attention()."""
    mask = None if attn_mask is None else np.asarray(attn_mask)
    return Problem(np.asarray(query), np.asarray(key), np.asarray(value), mask, **rules).attention()


def _with_heads(x: Array) -> Array:
    return x[None] if x.ndim == 2 else x


def _double(x: Array) -> Array:
    """Float64 in native order; exact for every dtype the library takes."""
    return np.asarray(x).astype(np.float64)


def _weigh(weights: Array, live: Array, value: Array) -> Array:
    """weights @ value (Sq, Dv), where a value that is not finite reaches the rows that attend to it and no other."""
    finite = np.isfinite(value)
    out = weights @ np.where(finite, value, 0.0)
    for j in np.flatnonzero(~finite.all(axis=-1)):
        rows = live[:, j]
        out[rows] += weights[rows, j][:, None] * np.where(finite[j], 0.0, value[j])
    out[(weights == 0).all(axis=-1)] = 0.0
    return out
