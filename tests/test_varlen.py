"""Packed sequences: the bits of each sequence alone, and errors for packings that cannot be."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gqa_ext

Array = NDArray[Any]
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def packed(rng: np.random.Generator, q_lengths: list[int], k_lengths: list[int], dtype: Any) -> tuple[Any, ...]:
    """query, key, value and both offsets, with a few rows past the last ones."""
    q_starts, k_starts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (q_lengths, k_lengths))
    query = rng.standard_normal((q_starts[-1] + 3, 6, 20)).astype(dtype)
    key = rng.standard_normal((k_starts[-1] + 2, 2, 20)).astype(dtype)
    value = rng.standard_normal((k_starts[-1] + 2, 2, 12)).astype(dtype)
    return query, key, value, q_starts, k_starts


RULES: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "causal_alignment": "lower_right"},
    {"is_causal": True, "window": (100, 5), "softcap": 20.0},
    {"window": (3, None), "causal_alignment": "lower_right", "scale": 0.5},
    {"sinks": np.linspace(-1, 1, 6), "is_causal": True},
    {"alibi_slopes": gqa_ext.get_alibi_slopes(6)},
]


@pytest.mark.quick
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "+".join(rules) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_alone(dtype: Any, rules: dict[str, Any], threads: int, isa: str) -> None:
    rng = np.random.default_rng(0)
    query, key, value, q_starts, k_starts = packed(rng, [1, 0, 70, 2, 9, 5], [600, 40, 70, 0, 130, 5], dtype)
    before = gqa_ext.get_num_threads()
    gqa_ext.set_num_threads(threads)
    try:
        out, lse = gqa_ext.varlen_attention(query, key, value, q_starts, k_starts, return_lse=True, **rules)
    finally:
        gqa_ext.set_num_threads(before)
    assert out.dtype == dtype
    assert lse.shape == out.shape[:-1]
    for b in range(len(q_starts) - 1):
        rows, keys = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
        alone = [x.transpose(1, 0, 2) for x in (query[rows], key[keys], value[keys])]
        options = {"causal_alignment": "upper_left", **rules}
        wanted, wanted_lse = gqa_ext.scaled_dot_product_attention(*alone, return_lse=True, **options)
        np.testing.assert_array_equal(out[rows].view(np.uint8), wanted.swapaxes(0, 1).copy().view(np.uint8))
        np.testing.assert_array_equal(lse[rows], wanted_lse.T)
    assert not out[q_starts[-1] :].astype(np.float64).any()
    assert np.isneginf(lse[q_starts[-1] :]).all()


def test_slopes_for_each_sequence() -> None:
    query, key, value, q_starts, k_starts = packed(np.random.default_rng(1), [4, 3], [9, 11], np.float32)
    slopes = np.random.default_rng(2).random((2, 6))
    out = gqa_ext.varlen_attention(query, key, value, q_starts, k_starts, alibi_slopes=slopes)
    for b in range(2):
        rows, keys = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
        alone = [x.transpose(1, 0, 2) for x in (query[rows], key[keys], value[keys])]
        wanted = gqa_ext.scaled_dot_product_attention(*alone, alibi_slopes=slopes[b])
        np.testing.assert_array_equal(out[rows], wanted.swapaxes(0, 1))


def test_out_and_no_sequences() -> None:
    query, key, value, q_starts, k_starts = packed(np.random.default_rng(3), [4, 3], [9, 11], np.float32)
    wanted = gqa_ext.varlen_attention(query, key, value, q_starts, k_starts)
    out = np.full((*query.shape[:2], 24), np.nan, np.float32)[:, ::-1, ::2]
    assert gqa_ext.varlen_attention(query, key, value, q_starts, k_starts, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    assert not gqa_ext.varlen_attention(query, key, value, [0], [0]).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_any_byte_order(dtype: Any) -> None:
    """Inputs and out of the other byte order; a new array has the native one."""
    query, key, value, q_starts, k_starts = packed(np.random.default_rng(6), [4, 3], [9, 11], dtype)
    wanted = gqa_ext.varlen_attention(query, key, value, q_starts, k_starts)
    swapped = [array.astype(array.dtype.newbyteorder()) for array in (query, key, value)]
    answer = gqa_ext.varlen_attention(*swapped, q_starts, k_starts)
    assert answer.dtype.isnative
    np.testing.assert_array_equal(answer, wanted)
    out = np.empty_like(wanted, dtype=swapped[0].dtype)
    assert gqa_ext.varlen_attention(query, key, value, q_starts, k_starts, out=out) is out
    np.testing.assert_array_equal(out, wanted)


def test_dropout_follows_the_sequence() -> None:
    """b is the sequence's index, so a longer neighbour moves nothing."""
    query, key, value, q_starts, k_starts = packed(np.random.default_rng(4), [4, 3], [9, 11], np.float32)
    whole = gqa_ext.varlen_attention(query, key, value, q_starts, k_starts, dropout_p=0.4, rng=5)
    first = gqa_ext.varlen_attention(query[:4], key[:9], value[:9], [0, 4], [0, 9], dropout_p=0.4, rng=5)
    np.testing.assert_array_equal(whole[:4], first)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_q": [0, 5, 4]}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": [1, 4, 7]}, ValueError, "rise from 0"),
        ({"cu_seqlens_k": [0, 9, 99]}, ValueError, "cu_seqlens_k"),
        ({"cu_seqlens_k": [0, 9]}, ValueError, "as many were wanted"),
        ({"cu_seqlens_q": [0.0, 4.0, 7.0]}, TypeError, "integers"),
        ({"cu_seqlens_q": []}, ValueError, r"\(B \+ 1,\)"),
        ({"attn_mask": np.ones((1, 1), bool)}, ValueError, "attn_mask"),
        ({"kv_lengths": [3, 3]}, ValueError, "kv_lengths"),
        ({"return_weights": True}, ValueError, "return_weights"),
        ({"alibi_slopes": np.ones(5)}, ValueError, "alibi_slopes"),
        ({"sinks": np.ones(2)}, ValueError, "sinks"),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"query": np.ones((7, 6), np.float32)}, ValueError, "query has 2 dimensions"),
        ({"query": np.ones((7, 5, 20), np.float32)}, ValueError, "multiple of key heads .*: pass .* one of 1, 5 heads"),
        ({"query": np.ones((7, 6, 20), np.int32)}, TypeError, "astype"),
        ({"query": np.ones((7, 6, 20))}, TypeError, "float64 goes only with float64"),
        ({"out": np.ones((10, 6, 13), np.float32)}, ValueError, r"out has shape .*\(10, 6, 12\) was wanted: pass"),
        ({"out": np.ones((10, 6, 12))}, TypeError, "out has dtype float64; query's dtype float32 was wanted: pass"),
        ({"out": np.broadcast_to(np.float32(0), (10, 6, 12))}, ValueError, "out is read-only"),
        ({"out": [1.0]}, TypeError, "out is a list"),
        (
            {
                name: np.broadcast_to(np.float32(0), shape)
                for name, shape in (("query", (10, 600, 20)), ("value", (22, 2, 2**50)))
            },
            MemoryError,
            r"out would have shape \(10, 600, 1125899906842624\); an array that memory can hold",
        ),
        ({"scale": 1e40}, ValueError, r"scale is 1e\+40; 0 or a size from .*: pass float64 arrays"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p is 2.0"),
        ({"dropout_p": 0.5, "rng": "seed"}, TypeError, "rng is"),
        ({"causal_alignment": "bottom_right"}, ValueError, "causal_alignment is 'bottom_right'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    query, key, value, q_starts, k_starts = packed(np.random.default_rng(5), [4, 3], [9, 11], np.float32)
    arguments = {"query": query, "key": key, "value": value, "cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts}
    with pytest.raises(error, match=words) as caught:
        gqa_ext.varlen_attention(**{**arguments, **change})
    assert str(caught.value).startswith("varlen_attention()")
