"""return_weights and dropout: weights are what multiplied the values, and slots are a function of their place."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from numpy.typing import NDArray

import gqa_ext
from gqa_ext import scaled_dot_product_attention as attend

Array = NDArray[Any]
RULES = {"is_causal": True, "causal_alignment": "lower_right", "window": (200, None), "softcap": 30.0}


def problem(dtype: Any = np.float32, seq_q: int = 3, seq_k: int = 700) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seq_q + seq_k)
    query = rng.standard_normal((2, 6, seq_q, 20)).astype(dtype)
    key, value = (rng.standard_normal((2, 2, seq_k, width)).astype(dtype) for width in (20, 12))
    return query, key, value


def product(weights: Array, value: Array) -> Array:
    return weights.astype(np.float64) @ gqa_ext.repeat_kv(value.astype(np.float64), 3)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (1, 130), (3, 700), (70, 300)])
def test_weights(seq_q: int, seq_k: int, dtype: Any, isa: str) -> None:
    query, key, value = problem(dtype, seq_q, seq_k)
    rules = {**RULES, "sinks": np.linspace(-1, 1, 6), "kv_lengths": [seq_k // 2, seq_k]}
    out, lse, weights = attend(query, key, value, return_lse=True, return_weights=True, **rules)
    oracle = reference.attention(query, key, value, **rules)
    exact = dtype == np.float64
    assert weights.dtype == lse.dtype == (np.float64 if exact else np.float32)
    np.testing.assert_allclose(weights, oracle.weights, rtol=0, atol=1e-13 if exact else 2e-6)
    rounding = {2: 1e-2, 4: 1e-5, 8: 1e-13}[np.dtype(dtype).itemsize]
    np.testing.assert_allclose(product(weights, value), out.astype(np.float64), atol=rounding, rtol=rounding)
    plain = attend(query, key, value, return_weights=True, **rules)
    np.testing.assert_array_equal(plain[1], weights)


def test_weights_of_nobody() -> None:
    query, key, value = problem()
    out, weights = attend(query, key, value, kv_lengths=[0, 700], query_lengths=[3, 1], return_weights=True)
    assert not weights[0].any()
    assert not weights[1, :, 1:].any()
    assert not out[0].any()
    np.testing.assert_allclose(weights[1, :, 0].sum(-1), 1, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float, isa: str) -> None:
    query, key, value = problem(seq_q=40)
    _, plain_lse, plain = attend(query, key, value, return_lse=True, return_weights=True, **RULES)
    out, lse, weights = attend(query, key, value, None, p, rng=7, return_lse=True, return_weights=True, **RULES)
    np.testing.assert_array_equal(lse, plain_lse)
    live = plain > 0
    assert not weights[~live].any()
    share = (weights[live] == 0).mean()
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / live.sum())  # five standard deviations
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], plain[kept] / (1 - p), rtol=1e-5)
    np.testing.assert_allclose(product(weights, value), out, atol=2e-5)


def test_slots_depend_on_their_place_only() -> None:
    query, key, value = problem(np.float64, seq_q=40, seq_k=600)
    _, whole = attend(query, key, value, None, 0.5, rng=3, return_weights=True)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        _, other = attend(*(x.astype(dtype) for x in (query, key, value)), None, 0.5, rng=3, return_weights=True)
        np.testing.assert_array_equal(other == 0, whole == 0)
    _, part = attend(query[:1, :, :5], key[:1, :, :200], value[:1, :, :200], None, 0.5, rng=3, return_weights=True)
    np.testing.assert_array_equal(part == 0, whole[:1, :, :5, :200] == 0)
    gqa_ext.set_num_threads(3)
    try:
        _, threads = attend(query, key, value, None, 0.5, rng=3, return_weights=True)
    finally:
        gqa_ext.set_num_threads(2)
    np.testing.assert_array_equal(threads, whole)
    slots = (whole == 0).reshape(-1, 600)
    assert len(np.unique(slots, axis=0)) == len(slots)  # no two rows drop alike


def test_rng() -> None:
    query, key, value = problem()
    same = [attend(query, key, value, None, 0.5, rng=11) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    generator = np.random.default_rng(0)
    first, second = (attend(query, key, value, None, 0.5, rng=generator) for _ in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(first, attend(query, key, value, None, 0.5, rng=np.random.default_rng(0)))
    assert (attend(query, key, value, None, 0.5) != attend(query, key, value, None, 0.5)).any()
    state = generator.bit_generator.state
    attend(query, key, value, rng=generator)
    assert generator.bit_generator.state == state  # nothing to drop, nothing drawn


def test_everything_dropped() -> None:
    query, key, value = problem()
    out, weights = attend(query, key, value, None, 1.0, rng=0, return_weights=True)
    assert not out.any()
    assert not weights.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dropout_p": 1.5}, ValueError, "probability"),
        ({"dropout_p": -0.1}, ValueError, "probability"),
        ({"dropout_p": float("nan")}, ValueError, "probability"),
        ({"dropout_p": "half"}, TypeError, "dropout_p"),
        ({"dropout_p": 0.5, "rng": "seed"}, TypeError, "np.random.Generator"),
        ({"rng": 1.5}, TypeError, "rng"),
        ({"return_weights": 3}, TypeError, "return_weights"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        attend(*problem(), **change)
    assert str(caught.value).startswith("scaled_dot_product_attention()")
