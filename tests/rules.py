"""Every rule of the score stage with values that make it matter, and the package's answer to a problem.

A Mix is a small hashable description of one call, as cases.Case is for calls without rules; its
problem and the oracle's answer are made from it, always the same, and remembered while the
instruction sets take their turns at it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from bounds import Expectation, check, expectations
from cases import random_mask
from numpy.typing import NDArray
from reference import Problem

import gqa_ext

Array = NDArray[Any]
DTYPES = ("float32", "float64", "float16", "bfloat16")
_ARRAYS = ("query", "key", "value", "attn_mask")


def dtype_of(name: str) -> np.dtype[Any]:
    """np.dtype(name), bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def attend(problem: Problem, **more: Any) -> tuple[Array, ...]:
    """(out, lse) of a problem by the package, every rule by its keyword; and weights where asked for."""
    fields = (field.name for field in dataclasses.fields(Problem) if field.name not in _ARRAYS)
    rules = {name: getattr(problem, name) for name in fields if getattr(problem, name) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # causal with Sq != Sk and no alignment
        answer: tuple[Array, ...] = gqa_ext.scaled_dot_product_attention(
            problem.query, problem.key, problem.value, problem.attn_mask, **rules, return_lse=True, **more
        )
    return answer


def agree(problem: Problem, isa: str = "default", label: str = "") -> tuple[Array, ...]:
    """The package's answer, which lies within bounds.py of the oracle's."""
    out, lse = attend(problem)
    check(out, problem, lse=lse, isa=isa, label=label)
    return out, lse


@dataclass(frozen=True)
class Mix:
    """One call: rules by their names in RULES, shapes and dtype."""

    rules: tuple[str, ...] = ()
    dtype: str = "float32"
    batch: int = 2
    num_kv_heads: int = 2
    group: int = 2
    seq_q: int = 3
    seq_k: int = 150
    head_dim: int = 24
    v_head_dim: int = 17

    def __str__(self) -> str:
        """Short enough for a test id."""
        return f"{'+'.join(self.rules) or 'plain'}-{self.seq_q}x{self.seq_k}x{self.head_dim}-{self.dtype}"

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([ord(c) for c in str(self)])


@functools.lru_cache(maxsize=4)
def problem(mix: Mix) -> Problem:
    """The arrays and rules of a mix."""
    rng = mix.generator()
    heads = mix.num_kv_heads * mix.group
    shapes = (
        (mix.batch, heads, mix.seq_q, mix.head_dim),
        (mix.batch, mix.num_kv_heads, mix.seq_k, mix.head_dim),
        (mix.batch, mix.num_kv_heads, mix.seq_k, mix.v_head_dim),
    )
    query, key, value = (rng.standard_normal(shape).astype(dtype_of(mix.dtype)) for shape in shapes)
    given: dict[str, Any] = {}
    for name in mix.rules:
        given |= RULES[name](rng, mix)
    return Problem(query, key, value, given.pop("attn_mask", None), **given)


@functools.lru_cache(maxsize=4)
def answer(mix: Mix) -> list[Expectation]:
    """What the oracle says of a mix."""
    return list(expectations(problem(mix)))


def agree_mix(mix: Mix, isa: str) -> None:
    """One mix against what the oracle said of it."""
    out, lse = attend(problem(mix))
    check(out, problem(mix), lse=lse, expected=answer(mix), isa=isa, label=str(mix))


def compatible(names: tuple[str, ...]) -> bool:
    """Whether no two of the rules set one and the same argument, or contradict each other."""
    masks = sum(name.endswith("_mask") for name in names)
    alignments = sum(name in ALIGNED for name in names)
    positions = "query_positions" in names and any(name in ALIGNED[1:] for name in names)
    return masks <= 1 and alignments <= 1 and not positions


def pairs() -> list[tuple[str, ...]]:
    """All pairs of rules that one call can have."""
    return [pair for pair in itertools.combinations(RULES, 2) if compatible(pair)]


# Each rule makes keyword arguments from a generator and the mix's shapes.

Rule = dict[str, Any]


def _window(rng: np.random.Generator, mix: Mix) -> Rule:
    """Closed, one-sided, the diagonal alone, wider than all keys."""
    windows = ((5, 3), (40, 0), (0, None), (None, 7), (0, 0), (mix.seq_k // 3, mix.seq_k), (None, None), (2**40, 9))
    return {"window": windows[int(rng.integers(len(windows)))]}


def _softcap(rng: np.random.Generator, mix: Mix) -> Rule:
    return {"softcap": float(rng.choice([0.5, 2.0, 30.0]))}


def _alibi(rng: np.random.Generator, mix: Mix) -> Rule:
    """Slopes per head or per sequence and head, of either sign, float32 or float64."""
    heads = mix.num_kv_heads * mix.group
    shape = (heads,) if rng.random() < 0.5 else (mix.batch, heads)
    return {"alibi_slopes": rng.uniform(-0.05, 0.5, shape).astype(rng.choice(["float32", "float64"]))}


def _sinks(rng: np.random.Generator, mix: Mix) -> Rule:
    return {"sinks": (2 * rng.standard_normal(mix.num_kv_heads * mix.group)).astype(np.float32)}


def _lengths(size: int, rng: np.random.Generator, mix: Mix) -> Array:
    """One for each sequence, the last of them whole."""
    lengths = rng.integers(0, size + 1, mix.batch).astype(rng.choice(["int64", "int32", "uint16"]))
    lengths[-1] = size
    return lengths


def _query_positions(rng: np.random.Generator, mix: Mix) -> Rule:
    """In no order, some before the first key and some past the last."""
    shape = (mix.seq_q,) if rng.random() < 0.5 else (mix.batch, mix.seq_q)
    return {"query_positions": rng.integers(-3, mix.seq_k + 3, shape)}


def _key_positions(rng: np.random.Generator, mix: Mix) -> Rule:
    """Left padding, or any order with repeats and absent keys."""
    if rng.random() < 0.5:
        padding = rng.integers(0, max(1, mix.seq_k // 2), (mix.batch, 1))
        return {"key_positions": np.arange(mix.seq_k) - padding}
    return {"key_positions": rng.integers(-mix.seq_k // 4, mix.seq_k, mix.seq_k).astype(np.int32)}


def _mask(dtypes: tuple[str, ...], rng: np.random.Generator, mix: Mix) -> Rule:
    heads = mix.num_kv_heads * mix.group
    shapes = ((mix.batch, heads, mix.seq_q, mix.seq_k), (mix.batch, 1, mix.seq_q, mix.seq_k), (mix.seq_q, mix.seq_k))
    shape = shapes[int(rng.integers(len(shapes)))]
    return {"attn_mask": random_mask(rng, shape, str(rng.choice(dtypes)))}


RULES: dict[str, Callable[[np.random.Generator, Mix], Rule]] = {
    "window": _window,
    "softcap": _softcap,
    "alibi": _alibi,
    "sinks": _sinks,
    "query_lengths": lambda rng, mix: {"query_lengths": _lengths(mix.seq_q, rng, mix)},
    "kv_lengths": lambda rng, mix: {"kv_lengths": _lengths(mix.seq_k, rng, mix)},
    "query_positions": _query_positions,
    "key_positions": _key_positions,
    "bool_mask": functools.partial(_mask, ("bool",)),
    "float_mask": functools.partial(_mask, ("float16", "bfloat16", "float32", "float64")),
    "causal": lambda rng, mix: {"is_causal": True},
    "causal_upper_left": lambda rng, mix: {"is_causal": True, "causal_alignment": "upper_left"},
    "causal_lower_right": lambda rng, mix: {"is_causal": True, "causal_alignment": "lower_right"},
    "lower_right": lambda rng, mix: {"causal_alignment": "lower_right"},
}
ALIGNED = ("causal", "causal_upper_left", "causal_lower_right", "lower_right")
