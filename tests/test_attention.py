"""Agreement with the float64 oracle within bounds.py, on every instruction set.

The cross product of sizes, head_dims, ratios of heads, masks and kinds of values is sampled by
cases.py; layouts in memory are test_layout.py's, leaks test_leaks.py's.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import cases
import ml_dtypes
import numpy as np
import pytest
from bounds import check
from cases import DTYPES, MASK_DTYPES, Case
from numpy.typing import NDArray
from reference import Problem

import gqa_ext

Array = NDArray[Any]


def attend(problem: Problem, **more: Any) -> tuple[Array, Array]:
    """(out, lse) of a problem by the package."""
    rules = {name: getattr(problem, name) for name in ("is_causal", "causal_alignment", "scale")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # causal with Sq != Sk and no alignment
        return gqa_ext.scaled_dot_product_attention(
            problem.query, problem.key, problem.value, problem.attn_mask, **rules, return_lse=True, **more
        )


def agree(case: Case, isa: str) -> None:
    """One case against what the oracle said of it."""
    problem = cases.problem(case)
    out, lse = attend(problem)
    check(out, problem, lse=lse, expected=cases.answer(case), isa=isa, label=str(case))


def every(sampler: Any) -> list[Case]:
    return [case for dtype in DTYPES for case in sampler(dtype)]


@pytest.mark.parametrize("case", every(cases.sizes), ids=str)
def test_sizes(case: Case, isa: str) -> None:
    agree(case, isa)


@pytest.mark.parametrize("case", every(cases.head_dims), ids=str)
def test_head_dims(case: Case, isa: str) -> None:
    agree(case, isa)


@pytest.mark.parametrize("case", every(cases.ratios), ids=str)
def test_ratios(case: Case, isa: str) -> None:
    agree(case, isa)


@pytest.mark.parametrize("case", every(cases.kinds), ids=str)
def test_kinds(case: Case, isa: str) -> None:
    agree(case, isa)


@pytest.mark.quick
@pytest.mark.parametrize("case", every(cases.quick), ids=str)
def test_quick(case: Case, isa: str) -> None:
    agree(case, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", [1, 3, 50])
@pytest.mark.parametrize("kind", ["ones", "offset", "equal"])
def test_sixty_four_thousand_keys(kind: str, seq_q: int, dtype: str, isa: str) -> None:
    agree(Case(dtype=dtype, kind=kind, seq_q=seq_q, seq_k=65_539, head_dim=8, v_head_dim=5), isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", [1, 50])
def test_value_one_gives_one(seq_q: int, dtype: str, isa: str) -> None:
    """Numerator and denominator are the same sums, so 64k keys cost next to nothing."""
    problem = cases.problem(Case(dtype=dtype, kind="ones", seq_q=seq_q, seq_k=65_536, head_dim=8, v_head_dim=5))
    out, _ = attend(problem)
    assert np.abs(out - 1).max() <= 16 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES)
@pytest.mark.parametrize("seq_q", [2, 60])
def test_masks_of_every_dtype(mask_dtype: str, seq_q: int, dtype: str, isa: str) -> None:
    for seq_k in (5, 130, 520):
        case = Case(dtype=dtype, batch=2, num_kv_heads=2, group=2, seq_q=seq_q, seq_k=seq_k, mask=mask_dtype)
        agree(case, isa)
        agree(replace(case, is_causal=True, causal_alignment="lower_right"), isa)


MASK_SHAPES = [(), (1,), (150,), (7, 1), (7, 150), (1, 150), (1, 1, 1), (4, 1, 150), (4, 7, 1), (1, 7, 150),
               (3, 1, 1, 1), (3, 4, 7, 150), (1, 4, 7, 150), (3, 1, 7, 150), (3, 4, 1, 150), (2, 1, 1, 1, 1),
               (2, 3, 1, 7, 150), (2, 1, 4, 1, 150)]  # fmt: skip


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_masks_broadcast_in_every_dimension(shape: tuple[int, ...], dtype: str, isa: str) -> None:
    rng = np.random.default_rng(7)
    leading = (2, 3) if len(shape) == 5 else (3,)
    query = rng.standard_normal((*leading, 4, 7, 8), dtype=np.float32)
    key, value = (rng.standard_normal((*leading, 2, 150, 8), dtype=np.float32) for _ in range(2))
    keep = rng.random(shape) < 0.6
    mask = np.asarray(keep if dtype == "bool" else np.where(keep, rng.standard_normal(shape), -np.inf).astype(dtype))
    problem = Problem(query, key, value, mask)
    out, lse = attend(problem)
    check(out, problem, lse=lse, isa=isa, label=f"mask {shape}")


@pytest.mark.parametrize("alignment", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal(dtype: str, alignment: str | None, isa: str) -> None:
    """More queries than keys leaves rows with no key under lower_right: 0, and LSE -inf."""
    for seq_q, seq_k in ((1, 1), (1, 40), (40, 1), (5, 300), (300, 5), (130, 130), (64, 700), (700, 64)):
        case = Case(dtype=dtype, seq_q=seq_q, seq_k=seq_k, is_causal=True, causal_alignment=alignment)
        agree(case, isa)
        agree(replace(case, group=3, mask="bool"), isa)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0, 1e-30, 30.0, 1])
def test_scale(scale: float, isa: str) -> None:
    for dtype in DTYPES:
        for seq_q in (2, 60):
            agree(Case(dtype=dtype, seq_q=seq_q, seq_k=140, scale=scale), isa)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_mask_is_a_number(dtype: str, isa: str) -> None:
    """-1e9 and the smallest finite number, the usual stand-ins for -inf, are added, not taken for a mask."""
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((1, 2, 60, 8)).astype(dtype) for _ in range(3))
    for low in (-1e9, np.finfo(dtype).min):
        mask = np.zeros((60, 60), dtype)
        mask[:, 30:] = low  # beside live keys: weighs nothing
        mask[7] = low  # a whole row: a mean of all keys, not an empty row
        problem = Problem(query, key, value, mask)
        out, lse = attend(problem)
        check(out, problem, isa=isa, label=f"mask {low}")
        assert np.isfinite(lse).all()
        if low < -1e30:  # a score is lost beside such a number: the row is uniform
            np.testing.assert_allclose(out[..., 7, :], value.mean(axis=-2), rtol=1e-4, atol=1e-5)


def test_double_mask_beside_float32_is_clamped(isa: str) -> None:
    """A finite number that float32 cannot hold never becomes a mask, nor an infinity."""
    rng = np.random.default_rng(4)
    query, key, value = (rng.standard_normal((1, 1, 9, 8), dtype=np.float32) for _ in range(3))
    mask = np.full((9, 9), -1e300)
    out, lse = attend(Problem(query, key, value, mask))
    np.testing.assert_allclose(out, np.broadcast_to(value.mean(axis=-2, keepdims=True), out.shape), atol=1e-5)
    assert np.isfinite(lse).all()
    mask[:, 4] = 1e300
    out, lse = attend(Problem(query, key, value, mask))
    np.testing.assert_array_equal(out, np.broadcast_to(value[..., 4:5, :], out.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_sum_of_values_beyond_the_largest_float_is_infinite(rows: int, dtype: str, isa: str) -> None:
    """A third of the largest is still summed over three keys; a little more is inf, never NaN or another number."""
    query, key = np.zeros((rows, 8), dtype), np.zeros((3, 8), dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    for share, sign in ((0.33, 1), (0.33, -1), (0.353, 1), (0.353, -1)):  # 1.2e38 in float32
        value = np.full((3, 5), sign * share * largest, dtype)
        out = gqa_ext.scaled_dot_product_attention(query, key, value).astype(np.float64)
        near = np.abs(out / float(value[0, 0]) - 1) < 0.01
        assert (near | (out == sign * np.inf) if share * 3 > 1 else near).all()


@pytest.mark.parametrize("rows", [1, 40])
def test_a_sum_that_later_keys_outweigh_may_be_lost(rows: int, isa: str) -> None:
    """The largest score so far, 0, comes late: infinity times exp(-200) is NaN, and whatever comes is not finite."""
    query, key, value = np.ones((rows, 4), np.float32), np.zeros((4000, 4), np.float32), np.ones((4000, 2), np.float32)
    key[:2000], value[:2000] = -50, 1.2e38
    out = gqa_ext.scaled_dot_product_attention(query, key, value, scale=1.0)
    assert (~np.isfinite(out) | (np.abs(out - 1) < 1e-3)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_problem(dtype: str, isa: str) -> None:
    """Many units, splits and threads at once."""
    case = Case(dtype=dtype, batch=2, num_kv_heads=1, group=4, seq_q=400, seq_k=1300, head_dim=64, v_head_dim=64)
    agree(replace(case, is_causal=True, causal_alignment="lower_right"), isa)
