"""The problems that the numeric tests pose: edge sizes, kinds of values, and samples of their cross product.

A Case is a small hashable description; its problem and the oracle's answer are made from it, always
the same, and remembered while the instruction sets take their turns at it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from bounds import Expectation, expectations
from numpy.typing import NDArray
from reference import Problem

Array = NDArray[Any]

# Around every lane width (2..16), row tile (up to 48, eight to a unit), key tile (128) and key split (2048).
QUERY_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 64, 95, 97, 191, 193, 383, 385)
KEY_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 127, 128, 129, 255, 256, 257, 383, 385,
             640, 2047, 2048, 2049, 4097)  # fmt: skip
HEAD_DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 72, 80, 96, 100,
             127, 128, 129, 160, 192, 255, 256, 257, 320, 511, 512, 513, 576)  # fmt: skip
RATIOS = (1, 3, 5, 7, 71)
DTYPES = ("float32", "float64")
MASK_DTYPES = ("bool", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtype, kind of values, mask and causality."""

    dtype: str = "float32"
    kind: str = "random"
    batch: int = 1
    num_kv_heads: int = 1
    group: int = 1
    seq_q: int = 5
    seq_k: int = 9
    head_dim: int = 16
    v_head_dim: int = 16
    mask: str | None = None  # a dtype
    is_causal: bool = False
    causal_alignment: str | None = None
    scale: float | None = None

    def __str__(self) -> str:
        """Short enough for a test id; all that differs from the default."""
        sizes = f"{self.seq_q}x{self.seq_k}x{self.head_dim}"
        sizes += f"x{self.v_head_dim}" if self.v_head_dim != self.head_dim else ""
        heads = f"{self.batch}b{self.num_kv_heads * self.group}/{self.num_kv_heads}"
        causal = (self.causal_alignment or "causal") if self.is_causal else None
        return "-".join(x for x in (self.dtype, self.kind, heads, sizes, self.mask, causal) if x)

    @property
    def rules(self) -> dict[str, Any]:
        """Keyword arguments of the call, besides arrays."""
        rules: dict[str, Any] = {"is_causal": self.is_causal}
        if self.causal_alignment is not None:
            rules["causal_alignment"] = self.causal_alignment
        if self.scale is not None:
            rules["scale"] = self.scale
        return rules


@functools.lru_cache(maxsize=4)
def problem(case: Case) -> Problem:
    """The arrays of a case."""
    rng = np.random.default_rng([ord(c) for c in str(case)])
    heads = case.num_kv_heads * case.group
    query, key, value = KINDS[case.kind](
        rng,
        (case.batch, heads, case.seq_q, case.head_dim),
        (case.batch, case.num_kv_heads, case.seq_k, case.head_dim),
        (case.batch, case.num_kv_heads, case.seq_k, case.v_head_dim),
        np.dtype(case.dtype),
    )
    mask = None if case.mask is None else random_mask(rng, (case.batch, 1, case.seq_q, case.seq_k), case.mask)
    return Problem(query, key, value, mask, **case.rules)


@functools.lru_cache(maxsize=4)
def answer(case: Case) -> list[Expectation]:
    """What the oracle says of a case."""
    return list(expectations(problem(case)))


def random_mask(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """A mask with live, biased and dropped slots, and here and there a row with none left."""
    keep = rng.random(shape) < 0.7
    if shape[-2] > 2:
        keep[..., shape[-2] // 2, :] = False
    if dtype == "bool":
        return keep
    import ml_dtypes

    wanted = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    return np.where(keep, rng.standard_normal(shape) * 3, -np.inf).astype(wanted)


# Kinds of values. Each makes query, key and value from a generator, three shapes and a dtype.

Shape = tuple[int, ...]
Values = tuple[Array, Array, Array]


def _random(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in (q, k, v))
    return query, key, value


def _scaled(query_power: float, value_power: float, kind: float) -> Callable[..., Values]:
    """Normal values times powers of the largest (kind 1) or smallest normal (kind -1) number of the dtype."""

    def make(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
        query, key, value = _random(rng, q, k, v, dtype)
        base = dtype.type(np.finfo(dtype).max if kind > 0 else np.finfo(dtype).tiny)
        small, large = dtype.type(base**query_power), dtype.type(base**value_power)
        return query * small, key * small, value * large

    return make


def _denormal(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """Everything below the smallest normal number; the mean of such values is one too, not 0."""
    step = np.finfo(dtype).smallest_subnormal
    query, key, value = (rng.integers(-(2**20), 2**20, shape).astype(dtype) * step for shape in (q, k, v))
    return query, key, value


def _dominant(gap: float) -> Callable[..., Values]:
    """One key, anywhere, whose score leads all others by gap times the head_dim's root, for every row."""

    def make(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
        query, key, value = _random(rng, q, k, v, dtype)
        query = (np.abs(query) + 0.5).astype(dtype)
        if k[-2]:
            key[..., int(rng.integers(k[-2])), :] += dtype.type(gap)
        return query, key, value

    return make


def _equal(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """All keys alike and the scores large: the output is the plain mean."""
    query, key, value = _random(rng, q, k, v, dtype)
    return query * dtype.type(30), np.broadcast_to(key[..., :1, :] * dtype.type(30), k).copy(), value


def _ones(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """Value 1 everywhere: so is the output, however many keys."""
    query, key, value = _random(rng, q, k, v, dtype)
    return query, key, np.ones_like(value)


def _offset(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """Values far from 0 beside their spread."""
    query, key, value = _random(rng, q, k, v, dtype)
    return query, key, value + dtype.type(1000)


def _alternating(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """Products of alternating sign that nearly cancel, in the scores and in the output."""
    query, key, value = _random(rng, q, k, v, dtype)
    sign_d, sign_k = (np.where(np.arange(n) % 2, -1, 1).astype(dtype) for n in (q[-1], k[-2]))
    return query + 20 * sign_d, key + dtype.type(20), value + 100 * sign_k[:, None]


def _sloped(step: float) -> Callable[..., Values]:
    """Scores that rise (or fall) along the keys, so that the running maximum moves in every tile (or never)."""

    def make(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
        query, key, value = _random(rng, q, k, v, dtype)
        query[..., 0] = np.sqrt(q[-1])
        key[..., 0] = step * np.arange(k[-2])
        return query, key, value

    return make


def _sharp(rng: np.random.Generator, q: Shape, k: Shape, v: Shape, dtype: np.dtype[Any]) -> Values:
    """Scores tens apart: most weights vanish."""
    query, key, value = _random(rng, q, k, v, dtype)
    return query * dtype.type(6), key * dtype.type(6), value


KINDS: dict[str, Callable[..., Values]] = {
    "random": _random,
    "tiny": _scaled(0.6, 0.9, -1),
    "denormal": _denormal,
    "huge": _scaled(0.2, 0.8, 1),
    "dominant": _dominant(20.0),
    "one_hot": _dominant(1e12),
    "equal": _equal,
    "ones": _ones,
    "offset": _offset,
    "alternating": _alternating,
    "ascending": _sloped(0.25),
    "descending": _sloped(-0.25),
    "steep": _sloped(3.0),
    "sharp": _sharp,
}


# Samples of the cross product: every level of every factor, most pairs of levels, the rest by seeded chance.


def sizes(dtype: str) -> Iterator[Case]:
    """Every key size with a few query rows, and with many; every query size with some key size."""
    chance = random.Random(f"sizes {dtype}")
    pairs = [(chance.choice(QUERY_SIZES[:9]), n) for n in KEY_SIZES]
    pairs += [(chance.choice(QUERY_SIZES[9:]), n) for n in KEY_SIZES]
    pairs += [(m, chance.choice(KEY_SIZES[:18])) for m in QUERY_SIZES]
    pairs += [(m, chance.choice(KEY_SIZES[18:])) for m in QUERY_SIZES]
    for seq_q, seq_k in pairs:
        yield _varied(chance, Case(dtype=dtype, seq_q=seq_q, seq_k=seq_k))


def head_dims(dtype: str) -> Iterator[Case]:
    """Every head_dim of key, beside the same and another of value, with few rows and with many."""
    chance = random.Random(f"dims {dtype}")
    for head_dim in HEAD_DIMS:
        few = Case(dtype=dtype, seq_q=chance.choice((1, 2, 5)), seq_k=chance.choice((7, 40, 130)), head_dim=head_dim)
        many = replace(few, seq_q=chance.choice((20, 49, 70)))
        yield replace(few, v_head_dim=chance.choice(HEAD_DIMS))
        yield replace(few, head_dim=chance.choice(HEAD_DIMS), v_head_dim=head_dim)
        yield replace(many, v_head_dim=head_dim)
        yield replace(many, v_head_dim=chance.choice(HEAD_DIMS))


def ratios(dtype: str) -> Iterator[Case]:
    """Every ratio of heads: a group's heads are rows, so the forms change with it."""
    for group in RATIOS:
        for seq_q, seq_k in ((1, 1), (1, 200), (2, 33), (13, 140)):
            yield Case(dtype=dtype, batch=2, num_kv_heads=2, group=group, seq_q=seq_q, seq_k=seq_k, v_head_dim=11)
            yield Case(dtype=dtype, group=group, seq_q=seq_q, seq_k=seq_k, is_causal=True,
                       causal_alignment="lower_right")  # fmt: skip


def kinds(dtype: str) -> Iterator[Case]:
    """Every kind of values, in few rows and many, over one key tile and several splits."""
    for kind in KINDS:
        for seq_q, seq_k, head_dim in ((1, 60, 64), (3, 4200, 24), (60, 129, 64), (50, 700, 8)):
            yield Case(dtype=dtype, kind=kind, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, v_head_dim=20)


def quick(dtype: str) -> Iterator[Case]:
    """A few cases that reach every kernel: for sanitizers and emulated CPUs."""
    shapes = ((1, 1, 1), (0, 3, 8), (3, 0, 8), (1, 130, 33), (3, 530, 17), (50, 131, 20), (99, 5, 65))
    for seq_q, seq_k, head_dim in shapes:
        yield Case(dtype=dtype, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, v_head_dim=9)
        yield Case(dtype=dtype, batch=2, group=3, seq_q=seq_q, seq_k=seq_k, head_dim=head_dim, mask="bfloat16",
                   is_causal=True, causal_alignment="lower_right")  # fmt: skip
    for kind in KINDS:
        yield Case(dtype=dtype, kind=kind, seq_q=2, seq_k=140)
        yield Case(dtype=dtype, kind=kind, seq_q=20, seq_k=140)


def _varied(chance: random.Random, case: Case) -> Case:
    """The case with heads, head_dims, a mask and causality drawn by lot."""
    return replace(
        case,
        batch=chance.choice((1, 1, 2)),
        num_kv_heads=chance.choice((1, 1, 2)),
        group=chance.choice((1, 1, 2, 3)),
        head_dim=chance.choice((4, 8, 13, 32, 40)),
        v_head_dim=chance.choice((3, 8, 16, 40)),
        mask=chance.choice((None, None, *MASK_DTYPES)),
        is_causal=chance.random() < 0.4,
        causal_alignment=chance.choice((None, "upper_left", "lower_right")),
        scale=chance.choice((None, None, 0.7, -0.3, 0.0)),
    )
