"""int8 caches: the rounding of rows, its bound, and attention to what was kept."""

from __future__ import annotations

import numpy as np
import pytest
from caches import agrees, rows
from numpy.typing import NDArray
from reference import attention
from rules import dtype_of

from gqa_ext import KVCache, PagedKVCache


def kept(cache: KVCache) -> list[NDArray[np.float64]]:
    """Keys and values as an int8 cache means them."""
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    return [cache.keys * cache.key_scales[..., None].astype(np.float64),
            cache.values * cache.value_scales[..., None].astype(np.float64)]  # fmt: skip


@pytest.mark.parametrize("power", [0, -40, -44, -30, 30, 37])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_number_is_within_half_a_scale(dtype: str, power: int) -> None:
    with np.errstate(over="ignore"):
        wide = (rows(0, 2, 3, 9, 50, dtype="float64") * 10.0**power).astype(dtype_of(dtype))
    wide = np.where(np.isfinite(wide), wide, 0).astype(wide.dtype)
    wide[0, 0, 0] = 0
    cache = KVCache(2, 3, 50, capacity=9, dtype="int8")
    cache.append(wide, -wide[..., ::-1])
    for got, right in zip(kept(cache), (wide.astype(np.float64), -wide[..., ::-1].astype(np.float64)), strict=True):
        most = np.abs(right).max(-1, keepdims=True)
        scale = most / 127 * (1 + 2.0**-23) + 2.0**-149  # as the docstring says, rounded up to a float32
        assert (np.abs(got - right) <= scale / 2).all()
    assert cache.keys.dtype == np.int8
    assert np.abs(cache.keys.astype(int)).max() <= 127
    assert cache.nbytes == 2 * (2 * 3 * 9 * 50 + 2 * 3 * 9 * 4)


@pytest.mark.parametrize("query_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seq_q", [1, 5, 50])
def test_attention_to_what_was_kept(seq_q: int, query_dtype: str, isa: str) -> None:
    """Few rows and many; a ring, and several tiles; within the bounds of any other call."""
    for head_dim, seq_k, window in ((20, 300, None), (33, 2100, None), (16, 200, 70)):
        query = rows(0, 2, 4, seq_q, head_dim, dtype=query_dtype)
        cache = KVCache(2, 2, head_dim, capacity=seq_k, dtype="int8", window=window, v_head_dim=9)
        lengths = [seq_k, seq_k - 60]
        cache.append(rows(1, 2, 2, seq_k, head_dim), 3 * rows(2, 2, 2, seq_k, 9), lengths)
        if window is not None:
            continue_ring(cache, query)
            continue
        key, value = kept(cache)
        got = cache.attend(query, return_lse=True, softcap=3.0)
        single = [x.astype(np.float32) for x in (key, value)]
        agrees(got, query, *single, isa, is_causal=True, kv_lengths=lengths, softcap=3.0)


def continue_ring(cache: KVCache, query: NDArray[np.float32]) -> None:
    """After a wrap the last window keys are what counts."""
    key, value = (x.astype(np.float32) for x in kept(cache))
    got = cache.attend(query[:, :, -1:], return_lse=True)
    agrees(got, query[:, :, -1:], key, value)


def test_close_to_what_was_appended() -> None:
    """The rounding itself moves an output by about a hundredth of its spread."""
    query, key, value = rows(0, 1, 8, 1, 64), rows(1, 1, 2, 500, 64), rows(2, 1, 2, 500, 64)
    cache = KVCache(1, 2, 64, capacity=500, dtype="int8")
    cache.append(key, value)
    exact = attention(query, key, value).out
    # scores are off by |q|_1 s_k / 2 / sqrt(D) at most, outputs by s_v / 2 and what that moves the weights
    scores = np.abs(query).sum(-1).max() * np.abs(key).max() / 254 / 8
    bound = np.abs(value).max() / 254 + 2 * (np.exp(2 * scores) - 1) * np.abs(value).max()
    assert np.abs(cache.attend(query) - exact).max() < bound
    assert np.abs(cache.attend(query) - exact).max() < 0.01


def test_a_row_that_is_not_finite_reaches_those_who_see_it_only(isa: str) -> None:
    for seq_q in (4, 70):
        query = rows(0, 1, 2, seq_q, 16)
        clean = [rows(i, 1, 1, seq_q + 20, 16) for i in (1, 2)]
        bad = [x.copy() for x in clean]
        bad[0][0, 0, -2, 3], bad[1][0, 0, -1, 2] = np.inf, np.nan
        wanted, got = (KVCache(1, 1, 16, capacity=200, dtype="int8") for _ in range(2))
        wanted.append(*clean)
        got.append(*bad)
        out, right = got.attend(query), wanted.attend(query)
        assert np.isnan(out[:, :, -2:]).all()
        np.testing.assert_array_equal(out[:, :, :-2], right[:, :, :-2])
        mask = np.ones(seq_q + 20, bool)
        mask[-2:] = False
        np.testing.assert_array_equal(got.attend(query, attn_mask=mask), wanted.attend(query, attn_mask=mask))
        got.crop(seq_q + 18)
        assert np.isfinite(got.attend(query)).all()


def test_same_bits_in_blocks(isa: str) -> None:
    for block in (1, 7, 16):
        cache, paged = KVCache(2, 2, 24, capacity=300, dtype="int8"), PagedKVCache(700, block, 2, 24, dtype="int8")
        ids = [paged.new_sequence(), paged.new_sequence()]
        for begin, size in ((0, 150), (150, 1), (151, 140)):
            new = [rows(begin + i, 2, 2, size, 24) for i in (0, 1)]
            cache.append(*new, lengths=[size, size // 2])
            paged.append(ids, *new, lengths=[size, size // 2])
            for seq_q in (1, 30):
                query = rows(9, 2, 4, seq_q, 24)
                np.testing.assert_array_equal(paged.attend(ids, query), cache.attend(query))
