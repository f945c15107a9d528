"""Agreement with torch.nn.functional.scaled_dot_product_attention, the call this one is modelled on.

Both lie within bounds.py of the exact answer, so they lie within twice that of each other; the
same call is written for both, positional arguments included.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from bounds import expectations
from numpy.typing import NDArray
from reference import Problem, attention

import gqa_ext

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the problems are small, and OpenMP spins where cores are few
sdpa = torch.nn.functional.scaled_dot_product_attention

Array = NDArray[Any]
SHAPES = [  # query, key, value
    ((2, 4, 7, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    ((2, 6, 1, 64), (2, 2, 130, 64), (2, 2, 130, 64)),
    ((1, 8, 60, 32), (1, 1, 60, 32), (1, 1, 60, 32)),
    ((3, 6, 33, 20), (3, 3, 100, 20), (3, 3, 100, 12)),
    ((1, 4, 99, 80), (1, 2, 257, 80), (1, 2, 257, 80)),
]


def arrays(shapes: tuple[tuple[int, ...], ...], dtype: str) -> list[Array]:
    rng = np.random.default_rng([shape[-2] for shape in shapes])
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def ours(*args: Any, **rules: Any) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return gqa_ext.scaled_dot_product_attention(*args, **rules)


def theirs(*args: Any, **rules: Any) -> Array:
    given = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in args]
    return sdpa(*given, **rules).numpy()


def near(got: Array, wanted: Array, *given: Array | None, **rules: Any) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    query, key, value, *mask = given
    assert query is not None
    assert key is not None
    assert value is not None
    for expect in expectations(Problem(query, key, value, *mask, **rules)):
        error = np.abs(got[expect.index] - wanted[expect.index])
        assert (error <= 2 * expect.out_bound).all(), f"{error.max()} apart in head {expect.index}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("rules", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_plain(shapes: Any, rules: dict[str, Any], dtype: str, isa: str) -> None:
    given = arrays(shapes, dtype)
    near(ours(*given, **rules), theirs(*given, **rules, enable_gqa=True), *given, **rules)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shapes: Any, kind: str, dtype: str, isa: str) -> None:
    given = arrays(shapes, dtype)
    rng = np.random.default_rng(0)
    full = (shapes[0][0], shapes[0][1], shapes[0][2], shapes[1][2])
    for shape in (full, (1, 1, *full[2:]), full[2:], (full[0], 1, 1, full[3])):
        keep = rng.random(shape) < 0.7
        mask = keep if kind == "bool" else np.where(keep, rng.standard_normal(shape), -np.inf).astype(dtype)
        near(ours(*given, mask), theirs(*given, mask, enable_gqa=True), *given, mask)


def test_positional_arguments_mean_the_same() -> None:
    given = arrays(SHAPES[3], "float64")
    mask = np.random.default_rng(0).random((33, 100)) < 0.5
    near(ours(*given, mask, 0.0, False, 0.5, True), theirs(*given, mask, 0.0, False, scale=0.5, enable_gqa=True),
         *given, mask, scale=0.5)  # fmt: skip


def test_rows_without_a_key_are_zero_in_both() -> None:
    given = arrays(SHAPES[1], "float32")
    mask = np.zeros((1, 130), bool)
    assert np.array_equal(ours(*given, mask), theirs(*given, mask, enable_gqa=True))


def test_gqa_may_be_forbidden() -> None:
    """enable_gqa=False asks for as many heads of key as of query, as it does in torch."""
    same, grouped = arrays(SHAPES[0], "float32"), arrays(SHAPES[3], "float32")
    near(ours(*same, enable_gqa=False), theirs(*same, enable_gqa=False), *same)
    with pytest.raises(ValueError, match="enable_gqa"):
        ours(*grouped, enable_gqa=False)
    with pytest.raises(RuntimeError):
        theirs(*grouped, enable_gqa=False)


def test_the_oracle_itself() -> None:
    """tests/reference.py against torch's float64, for all that torch can say."""
    for shapes in SHAPES:
        given = arrays(shapes, "float64")
        mask = np.where(np.random.default_rng(0).random((shapes[0][2], shapes[1][2])) < 0.7, 0.3, -np.inf)
        for rules in ({}, {"is_causal": True}, {"scale": 2.0}, {"attn_mask": mask}, {"attn_mask": mask == 0.3}):
            arguments = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in rules.items()}
            wanted = theirs(*given, **arguments, enable_gqa=True)
            np.testing.assert_allclose(attention(*given, **rules).out, wanted, rtol=1e-12, atol=1e-13)


def test_the_oracles_lse() -> None:
    query, key, value = arrays(SHAPES[0], "float64")
    scores = torch.from_numpy(query @ key.swapaxes(-1, -2) / 4)
    np.testing.assert_allclose(attention(query, key, value).lse, scores.logsumexp(-1).numpy(), rtol=1e-13)
