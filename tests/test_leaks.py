"""What a slot holds that a row masks never reaches that row; what a row attends to always does.

The oracle knows the rules: a masked slot is dropped by selection, a live score of -inf weighs
nothing, a live +inf or NaN makes the row NaN, a row with nothing left is 0 with LSE -inf.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from bounds import check
from numpy.typing import NDArray
from reference import Problem

import gqa_ext

Array = NDArray[Any]
POISONS = (np.nan, np.inf, -np.inf, 1e30)
SIZES = [(2, 5), (3, 140), (2, 700), (20, 9), (60, 140), (50, 2200)]  # both forms; in a tile, across tiles and splits


def agree(isa: str, query: Array, key: Array, value: Array, mask: Any = None, **rules: Any) -> tuple[Array, Array]:
    problem = Problem(query, key, value, mask, **rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out, lse = gqa_ext.scaled_dot_product_attention(query, key, value, mask, **rules, return_lse=True)
    with np.errstate(all="ignore"):
        check(out, problem, lse=lse, isa=isa)
    return out, lse


def ordinary(seq_q: int, seq_k: int, dtype: str = "float32") -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([seq_q, seq_k])
    shapes = ((2, seq_q, 20), (1, seq_k, 20), (1, seq_k, 12))
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return query, key, value


def mask_of(keep: Array, kind: str) -> Array:
    return keep if kind == "bool" else np.where(keep, 0.5, -np.inf).astype(kind)


@pytest.mark.quick
@pytest.mark.parametrize("poison", [*POISONS, 3e38])
@pytest.mark.parametrize("mask", ["bool", "float32"])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_keys_masked_for_all(seq_q: int, seq_k: int, mask: str, poison: float, isa: str) -> None:
    """The answer is, to the bit, what it is with harmless values in those slots."""
    query, key, value = ordinary(seq_q, seq_k)
    dropped = np.arange(seq_k) % 3 == 1
    keep = np.broadcast_to(~dropped, (seq_q, seq_k)).copy()
    clean = agree(isa, query, key, value, mask_of(keep, mask))
    key[:, dropped], value[:, dropped] = poison, poison
    foul = agree(isa, query, key, value, mask_of(keep, mask))
    for a, b in zip(clean, foul, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_keys_masked_for_some(seq_q: int, seq_k: int, dtype: str, where: str, poison: float, isa: str) -> None:
    """A key that is live for one row and dropped for its neighbour reaches the one and not the other."""
    query, key, value = ordinary(seq_q, seq_k, dtype)
    foul = seq_k // 2
    keep = np.ones((seq_q, seq_k), bool)
    keep[::2, foul] = False
    clean, _ = agree(isa, query, key, value, keep)
    if where != "value":
        key[:, foul] = poison
    if where != "key":
        value[:, foul] = poison
    for mask in (keep, mask_of(keep, "float32")):
        out, _ = agree(isa, query, key, value, mask)
        assert np.isfinite(out[:, ::2]).all()
        np.testing.assert_allclose(out[:, ::2], clean[:, ::2], rtol=1e-4, atol=1e-5)
        if where != "key" and np.isnan(poison):
            assert np.isnan(out[:, 1::2]).all()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [*SIZES, (140, 140), (300, 20)])
def test_later_keys_under_causal(seq_q: int, seq_k: int, alignment: str, dtype: str, poison: float, isa: str) -> None:
    query, key, value = ordinary(seq_q, seq_k, dtype)
    for foul in (seq_k - 1, seq_k // 2):
        key[:, foul], value[:, foul] = poison, poison
        out, _ = agree(isa, query, key, value, is_causal=True, causal_alignment=alignment)
        first = foul - (seq_k - seq_q if alignment == "lower_right" else 0)  # the first row to see it
        assert np.isfinite(out[:, : max(0, min(first, seq_q))]).all()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_a_foul_query_row_keeps_to_itself(seq_q: int, seq_k: int, poison: float, isa: str) -> None:
    query, key, value = ordinary(seq_q, seq_k)
    query[0, 1] = poison
    out, _ = agree(isa, query, np.abs(key) + 1, value)  # of one sign, so that inf stays inf
    assert np.isfinite(out[1]).all()
    assert np.isfinite(out[0, np.arange(seq_q) != 1]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_empty_rows(seq_q: int, seq_k: int, dtype: str, isa: str) -> None:
    """A row with no key is 0 with LSE -inf, whatever its query, the keys and the values hold."""
    query, key, value = ordinary(seq_q, seq_k, dtype)
    query[:, 1], key[:, 0], value[:, -1] = np.nan, np.nan, np.inf
    keep = np.ones((seq_q, seq_k), bool)
    keep[1] = False
    for mask in (keep, mask_of(keep, "float64")):
        out, lse = agree(isa, query, key, value, mask)
        assert (out[:, 1] == 0).all()
        assert (lse[:, 1] == -np.inf).all()
    out, lse = agree(isa, query, key, value, np.zeros((seq_q, 1), bool))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_scores_that_overflow(seq_q: int, seq_k: int, dtype: str, isa: str) -> None:
    """-inf weighs nothing, and a row of only those is empty; +inf makes the row NaN."""
    query, key, value = ordinary(seq_q, seq_k, dtype)
    huge = np.sqrt(np.finfo(dtype).max).astype(dtype) * 4
    query, key = np.abs(query) + 1, np.abs(key) / 8
    key[:, seq_k // 2] = -huge
    query[:, 0] = huge
    agree(isa, query, key[:, : seq_k // 2 + 1] * 0 - huge, value[:, : seq_k // 2 + 1])
    out, lse = gqa_ext.scaled_dot_product_attention(query, np.zeros_like(key) - huge, value, return_lse=True)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -np.inf).all()
    agree(isa, query, key, value)
    key[:, seq_k // 2] = huge
    out, _ = agree(isa, query, key, value)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1:]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_mask_with_nan_or_inf(seq_q: int, seq_k: int, poison: float, isa: str) -> None:
    """NaN and +inf in a float mask are live."""
    query, key, value = ordinary(seq_q, seq_k)
    mask = np.zeros((seq_q, seq_k), np.float32)
    mask[1, seq_k // 2] = poison
    out, _ = agree(isa, query, key, value, mask)
    assert np.isnan(out[:, 1]).all()
    assert np.isfinite(out[:, np.arange(seq_q) != 1]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_live_key_anywhere(dtype: str, isa: str) -> None:
    """Every row keeps one key, of which it returns the value to the bit; everything else is NaN."""
    for seq_q, seq_k in ((3, 700), (60, 700)):
        query, key, value = ordinary(seq_q, seq_k, dtype)
        kept = np.random.default_rng(0).integers(0, seq_k, seq_q)
        keep = np.zeros((seq_q, seq_k), bool)
        keep[np.arange(seq_q), kept] = True
        foul = ~keep.any(axis=0)
        key[:, foul], value[:, foul] = np.nan, np.nan
        out, _ = agree(isa, query, key, value, keep)
        assert np.array_equal(out, np.broadcast_to(value[:, kept], out.shape))
