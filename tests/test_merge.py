"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bounds import expectations
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Problem
from rules import Mix, attend, problem

from gqa_ext import merge_attention

Array = NDArray[Any]
INF = np.inf


def split(whole: Problem, cuts: list[int]) -> list[Problem]:
    """The problem over the keys between one cut and the next; positions travel with the keys, a sink with the first."""
    edges = [0, *sorted(cuts), whole.key.shape[-2]]
    positions = np.arange(whole.key.shape[-2]) if whole.key_positions is None else np.asarray(whole.key_positions)
    parts = []
    for p, (start, stop) in enumerate(itertools.pairwise(edges)):
        keys = slice(start, stop)
        mask = whole.attn_mask if whole.attn_mask is None else whole.attn_mask[..., keys]
        parts.append(
            replace(whole, key=whole.key[..., keys, :], value=whole.value[..., keys, :], attn_mask=mask,
                    key_positions=positions[..., keys], sinks=whole.sinks if p == 0 else None)
        )  # fmt: skip
    return parts


def near(got: tuple[Array, Array], whole: Problem) -> None:
    """Within twice the bound of one call, as each part has its own error."""
    out, lse = got
    for expect in expectations(whole):
        assert (np.abs(out[expect.index] - expect.out) <= 2 * expect.out_bound).all()
        finite = np.isfinite(expect.lse)
        np.testing.assert_array_equal(np.isfinite(lse[expect.index]), finite)
        error = np.abs(lse[expect.index][finite] - expect.lse[finite])
        assert (error <= 2 * expect.lse_bound[finite]).all()


MIXES = [
    ("softcap", "alibi", "sinks"),
    ("bool_mask", "sinks"),
    ("float_mask", "window", "causal"),
    ("key_positions", "query_positions", "query_lengths", "sinks"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_keys_may_be_split_anywhere(names: tuple[str, ...], dtype: str) -> None:
    whole = problem(Mix(names, dtype, seq_q=7, seq_k=60))
    for cuts in ([30], [1, 59], [0, 20, 20, 60], list(range(1, 60))):
        parts = [attend(part) for part in split(whole, cuts)]
        outs, lses = zip(*parts, strict=True)
        out, lse = merge_attention(outs, lses)
        assert out.dtype == whole.query.dtype
        assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert out.flags.c_contiguous
        if dtype in ("float32", "float64"):
            near((out, lse), whole)
        else:  # each part was rounded to its dtype, so the errors of halves are those of their last place
            eps = float(ml_dtypes.finfo(whole.query.dtype).eps)
            wanted = whole.attention()
            np.testing.assert_allclose(out.astype(float), wanted.out, rtol=2 * eps, atol=2 * eps)
            np.testing.assert_allclose(lse, wanted.lse, rtol=1e-5, atol=1e-5)


lse_values = st.one_of(st.floats(-1e5, 1e5), st.just(-INF))


@given(st.lists(st.tuples(lse_values, st.floats(-1e3, 1e3)), min_size=1, max_size=8), st.randoms())
@settings(max_examples=200, deadline=None)
def test_merging_is_the_weighted_mean_in_any_order_and_grouping(parts: Any, chance: Any) -> None:
    outs = [np.full((2, 3), value) for _, value in parts]
    lses = [np.full(2, lse) for lse, _ in parts]
    out, lse = merge_attention(outs, lses)
    total = np.logaddexp.reduce(np.array(lses), axis=0)
    np.testing.assert_allclose(lse, total, rtol=1e-14, atol=1e-14)
    if np.isfinite(total[0]):
        shares = np.exp(np.array(lses) - total)
        bound = 1e-9 * max(abs(value) for _, value in parts)
        np.testing.assert_allclose(out, np.einsum("pi,pij->ij", shares, np.array(outs)), rtol=1e-10, atol=bound)
    else:
        assert not out.any()
    cut = chance.randint(0, len(parts))
    halves = [merge_attention(outs[a:b], lses[a:b]) for a, b in ((0, cut), (cut, len(parts))) if a < b]
    chance.shuffle(halves)
    again, lse_again = merge_attention(*zip(*halves, strict=True))
    bound = 1e-9 * max(abs(value) for _, value in parts)
    np.testing.assert_allclose(again, out, rtol=1e-9, atol=bound)
    np.testing.assert_allclose(lse_again, lse, rtol=1e-14, atol=1e-13)


def test_a_part_without_keys_is_dropped_whatever_it_holds() -> None:
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.standard_normal((2, 3)).astype(np.float32)
    for poison in (np.nan, INF, -INF, 1e38):
        dead = np.full_like(out, poison), np.full_like(lse, -INF)
        for parts in ([(out, lse), dead], [dead, (out, lse), dead]):
            got = merge_attention(*zip(*parts, strict=True))
            np.testing.assert_array_equal(got[0], out)
            np.testing.assert_array_equal(got[1], lse)
    none, minus = merge_attention([np.full_like(out, np.nan)] * 2, [np.full_like(lse, -INF)] * 2)
    np.testing.assert_array_equal(none, np.zeros_like(out))
    np.testing.assert_array_equal(minus, np.full_like(lse, -INF))


def test_row_by_row() -> None:
    """Dead in one row, live in the next; NaN of a live part reaches its own row only."""
    outs = [np.array([[1.0], [np.nan], [3.0], [np.nan]]), np.array([[5.0], [6.0], [np.nan], [8.0]])]
    lses = [np.array([0.0, -INF, 0.0, 0.0]), np.array([0.0, 2.0, -INF, 0.0])]
    out, lse = merge_attention(outs, lses)
    np.testing.assert_array_equal(out, [[3.0], [6.0], [3.0], [np.nan]])
    np.testing.assert_allclose(lse, [np.log(2), 2, 0, np.log(2)], rtol=1e-15)
    out, lse = merge_attention(outs, [np.array([np.nan, 0, 0, 0]), np.zeros(4)])
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0])


def test_one_part_and_many_and_large_lses() -> None:
    rng = np.random.default_rng(1)
    out, lse = rng.standard_normal((5, 6)).astype(np.float16), rng.standard_normal(5).astype(np.float32) * 1e30
    got = merge_attention([out], [lse])
    np.testing.assert_array_equal(got[0], out)
    np.testing.assert_array_equal(got[1], lse)
    many, more = merge_attention([out] * 1000, [lse] * 1000)
    np.testing.assert_allclose(many.astype(float), out.astype(float), rtol=1e-3)
    np.testing.assert_allclose(more, lse + np.log(1000), rtol=1e-6)


def test_any_arrays_and_iterables_and_nothing_is_written() -> None:
    rng = np.random.default_rng(2)
    outs, lses = rng.standard_normal((3, 2, 5, 4)), rng.standard_normal((3, 2, 5))
    wanted = merge_attention(list(outs), list(lses))
    before = outs.tobytes(), lses.tobytes()
    outs.flags.writeable = lses.flags.writeable = False
    swapped = outs.astype(">f8"), lses.astype(">f8")
    strided = np.repeat(outs, 2, -1)[..., ::2], np.repeat(lses, 2, -1)[..., ::2]
    for pair in ((outs, lses), (iter(outs), iter(lses)), swapped, strided, (outs.tolist(), lses.tolist())):
        got = merge_attention(*pair)
        for mine, theirs in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype.isnative
    assert before == (outs.tobytes(), lses.tobytes())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 5, 4), (1, 1)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    out, lse = merge_attention([np.ones(shape)] * 2, [np.zeros(shape[:-1])] * 2)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    np.testing.assert_allclose(out, 1)
