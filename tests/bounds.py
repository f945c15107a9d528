"""How wrong an answer may be, element by element, and the worst that this run has seen.

Let u be the unit roundoff of the arithmetic (2**-24 for float32, 2**-53 for float64), p the exact
weights, o the exact output, and a_ij = scale * sum_d |q_id| |k_jd| + |mask_ij| + |ALiBi_ij| the magnitude of
a score.  A sum of n terms is allowed

    g(n) = u * min(n, 6 sqrt(n)),

which is the worst case up to n = 36 and a generous random walk past it (Higham and Mary, "A New
Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019).

1. The score of (i, j), less the row's maximum, and its exponential are off by a factor e**E, with
   E_ij = (g(D) + 8u) a_ij + 4u (|s_ij| + |max_i| + 2).
2. Weights off by factors within e**-E .. e**E move the output, whatever their signs, by at most
   sum_j p_ij (e**E_ij - 1) |v_j - o_i| / sum_j p_ij e**-E_ij, and never further than max_j |v_j - o_i|,
   as the output stays a weighted mean of live values, as long as sum_j |v_j| over them is finite: the sum
   that is divided in the end has had weights relative to the largest score so far, and overflows no sooner.
   (A row without live keys is exactly 0.)
3. The two sums over n live keys and their quotient add (g(n) + 8u) (sum_j p_ij |v_j| + |o_i|).
4. Weights below c = 2**-102 (float64: 2**-969) of the row's largest count as 0, which adds n (c max|v| +
   smallest subnormal; of bfloat16, which some ISAs multiply by pairs, smallest normal number); the output is
   rounded once to its dtype.

The LSE is off by at most sum_j p_ij (e**E_ij - 1) + g(n) + 8u (1 + |lse|).

The oracle is itself float64, so beside a float64 answer all of it counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from reference import Head, Problem

Array = NDArray[Any]

worst: dict[tuple[str, str, str], float] = {}  # (ISA, dtype, "out" or "lse") -> largest error / bound so far


@dataclass(frozen=True)
class Expectation:
    """The oracle's answer for one head, and how far from it is right."""

    index: tuple[int, ...]  # (..., h)
    out: Array  # (Sq, Dv)
    out_bound: Array  # (Sq, Dv)
    lse: Array  # (Sq,)
    lse_bound: Array  # (Sq,)


def expectations(problem: Problem) -> Iterator[Expectation]:
    """One for every head of a problem."""
    for index, head in problem.heads():
        out_bound, lse_bound = bounds(head, problem.query.shape[-1], problem.query.dtype)
        yield Expectation(index, head.out, out_bound, head.lse, lse_bound)


def check(
    got: Array,
    problem: Problem,
    *,
    lse: Array | None = None,
    expected: Iterable[Expectation] | None = None,
    isa: str = "default",
    label: str = "",
) -> None:
    """Assert that an answer, and its LSE where given, lies within the bound of the oracle's."""
    assert got.shape == problem.out_shape, f"{label}: shape {got.shape}, wanted {problem.out_shape}"
    assert got.dtype == problem.query.dtype.newbyteorder("="), f"{label}: dtype {got.dtype}"
    name = got.dtype.name
    if lse is not None:
        assert lse.shape == got.shape[:-1], f"{label}: lse shape {lse.shape}"
        assert lse.dtype == (np.float64 if name == "float64" else np.float32), f"{label}: lse dtype {lse.dtype}"
    for expect in expectations(problem) if expected is None else expected:
        index = expect.index if problem.ndim > 2 else ()
        _compare(got[index], expect.out, expect.out_bound, (isa, name, "out"), f"{label} out{list(index)}")
        if lse is not None:
            _compare(lse[index], expect.lse, expect.lse_bound, (isa, name, "lse"), f"{label} lse{list(index)}")


def bounds(head: Head, head_dim: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Bounds of the output (Sq, Dv) and of the LSE (Sq,) of one head; the module says why."""
    double = dtype == np.float64
    arithmetic = np.finfo(np.float64 if double else np.float32)
    u = float(arithmetic.eps) / 2
    with np.errstate(all="ignore"):
        value = np.where(np.isfinite(head.value), head.value, 0.0)
        weights, out = np.nan_to_num(head.weights, nan=0.0), np.nan_to_num(head.out)
        relative = _score_error(head, head_dim, u)
        shift, spread = _moved(head, weights, value, out, relative)
        keys = head.live.sum(axis=-1)
        total = (_sum_error(keys, u) + 8 * u)[:, None]
        bound = np.fmin(shift, spread) + total * (weights @ np.abs(value) + np.abs(out))
        largest = np.abs(value).max(axis=0, initial=0.0)
        cut = 2.0**-969 if double else 2.0**-102
        least = arithmetic.smallest_normal if dtype == ml_dtypes.bfloat16 else arithmetic.smallest_subnormal
        bound += keys[:, None] * (cut * largest + float(least))
        stored = ml_dtypes.finfo(dtype)
        bound += float(stored.eps) / 2 * np.abs(out) + float(stored.smallest_subnormal)
        bound[~(weights > 0).any(axis=-1)] = 0.0
        lse = np.where(np.isfinite(head.lse), head.lse, 0.0)
        lse_bound = _gained(head, weights, relative).sum(-1) + _sum_error(keys, u) + 8 * u * (1 + np.abs(lse))
    return (2 if double else 1) * bound, (2 if double else 1) * lse_bound


def _sum_error(n: Any, u: float) -> Any:
    return u * np.minimum(n, 6 * np.sqrt(n))


def _score_error(head: Head, head_dim: int, u: float) -> Array:
    """E (Sq, Sk) of point 1; 0 where a slot weighs nothing."""
    top = head.scores.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    finite = np.isfinite(head.scores)
    scores = np.where(finite, head.scores, 0.0)
    error = (_sum_error(head_dim, u) + 8 * u) * head.magnitude + 4 * u * (np.abs(scores) + np.abs(top) + 2)
    return np.where(finite, error, 0.0)


def _gained(head: Head, weights: Array, relative: Array) -> Array:
    """p (e**E - 1) (Sq, Sk); where E is large by way of the score, as p itself may have underflowed."""
    lse = np.where(np.isfinite(head.lse), head.lse, 0.0)[:, None]
    large = np.exp(np.minimum(np.where(np.isfinite(head.scores), head.scores - lse + relative, -np.inf), 700.0))
    return np.where(relative < 1, weights * np.expm1(np.minimum(relative, 1)), large)


def _moved(head: Head, weights: Array, value: Array, out: Array, relative: Array) -> tuple[Array, Array]:
    """The two limits of point 2, each (Sq, Dv)."""
    wrong = _gained(head, weights, relative)
    kept = (weights * np.exp(-relative)).sum(axis=-1, keepdims=True)
    shift = np.stack([wrong[i] @ np.abs(value - out[i]) for i in range(len(out))]) if len(out) else out
    attended = value[head.live.any(axis=0)]
    low, high = attended.min(axis=0, initial=np.inf), attended.max(axis=0, initial=-np.inf)
    return np.where(kept > 0, shift / kept, np.inf), np.maximum(np.abs(high - out), np.abs(low - out))


def _compare(got: Array, expected: Array, bound: Array, record: tuple[str, str, str], label: str) -> None:
    got = got.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        raise AssertionError(f"{label}: {_first(got, expected, ~finite & ~_same(got, expected))}")
    error = np.abs(got[finite] - expected[finite])
    ratio = np.where(error == 0, 0.0, error / np.maximum(bound[finite], 5e-324))
    largest = float(ratio.max(initial=0.0))
    if not largest <= 1.0:  # catches NaN
        bad = finite & ~(np.abs(got - expected) <= bound)
        raise AssertionError(f"{label}: {largest:.3g} times the bound; {_first(got, expected, bad)}")
    worst[record] = max(worst.get(record, 0.0), largest)


def _same(got: Array, expected: Array) -> Array:
    return (got == expected) | (np.isnan(got) & np.isnan(expected))


def _first(got: Array, expected: Array, bad: Array) -> str:
    where = np.argwhere(bad)
    first = tuple(int(i) for i in where[0])
    return f"{len(where)} of {bad.size} wrong, first at {list(first)}: got {got[first]!r}, expected {expected[first]!r}"
