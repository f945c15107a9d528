"""What the tests of caches share: random rows, and attention over the keys that a cache should hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from bounds import check
from numpy.typing import NDArray
from reference import Problem
from rules import dtype_of

import gqa_ext

Array = NDArray[Any]


def rows(seed: int, *shape: int, dtype: str = "float32") -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype_of(dtype))


def dense(query: Array, key: Array, value: Array, **rules: Any) -> Any:
    """The package's attention to plain arrays, aligned as in a cache."""
    return gqa_ext.scaled_dot_product_attention(query, key, value, causal_alignment="lower_right", **rules)


def same(got: Array, wanted: Array) -> None:
    """Bit for bit."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    different = np.flatnonzero(got.ravel() != wanted.ravel())
    assert got.tobytes() == wanted.tobytes(), f"{different.size} of {got.size} differ, first at {different[:1]}"


def agrees(
    got: tuple[Array, Array], query: Array, key: Array, value: Array, isa: str = "default", **rules: Any
) -> None:
    """(out, lse) lie within bounds.py of the oracle's answer over these keys."""
    problem = Problem(query, key, value, rules.pop("attn_mask", None), causal_alignment="lower_right", **rules)
    check(got[0], problem, lse=got[1], isa=isa)


def scattered(key: Array, value: Array, lengths: list[int], block: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Blocks in random order that hold the first rows of each sequence, NaN elsewhere, and a table whose unused
    entries name no block."""
    batch, heads, seq, _ = key.shape
    columns = -(-seq // block) + 1
    used = [(b, j) for b in range(batch) for j in range(-(-lengths[b] // block))]
    places = np.random.default_rng(seed).permutation(len(used) + 3)
    table = np.full((batch, columns), -(2**40), np.int64)
    stores = [np.full((len(places), heads, block, x.shape[-1]), np.nan).astype(x.dtype) for x in (key, value)]
    for place, (b, j) in zip(places, used, strict=False):
        table[b, j] = place
        end = min((j + 1) * block, lengths[b])
        for store, x in zip(stores, (key, value), strict=True):
            store[place][:, : end - j * block] = x[b][:, j * block : end]
    return stores[0], stores[1], table
