"""Every wrong argument of RotaryEmbedding is named, with what was wanted and the fix."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from gqa_ext import RotaryEmbedding

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
CONSTRUCTORS = [
    (ValueError, r"rope_type 'su'; known are default, linear, dynamic, yarn, longrope, llama3",
     {"scaling": {"type": "su"}}),
    (ValueError, r"nested per layer type \(full_attention, sliding_attention\).*scaling\['full_attention'\]",
     {"scaling": {"full_attention": LINEAR, "sliding_attention": None}}),
    (ValueError, r"base is 100000\.0 and scaling has rope_theta 10000",
     {"base": 1e5, "scaling": {"rope_theta": 10_000}}),
    (ValueError, r"rotary_dim is 8 and scaling\['partial_rotary_factor'\] gives 4",
     {"rotary_dim": 8, "scaling": {"partial_rotary_factor": 0.25}}),
    (ValueError, r"rope_type 'linear' and type 'yarn'", {"scaling": LINEAR | {"type": "yarn"}}),
    (ValueError, r"max_position_embeddings is 8 and scaling has max_position_embeddings 9",
     {"max_position_embeddings": 8, "scaling": LINEAR | {"max_position_embeddings": 9}}),
    (ValueError, r"scaling lacks factor; rope_type 'linear'", {"scaling": {"rope_type": "linear", "factor": None}}),
    (ValueError, r"scaling lacks rope_type; .*beside factor", {"scaling": {"factor": 2.0}}),
    (ValueError, r"scaling lacks max_position_embeddings; .*pass max_position_embeddings=",
     {"scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    (ValueError, r"scaling lacks original_max_position_embeddings", {"scaling": {"rope_type": "yarn", "factor": 2.0}}),
    (ValueError, r"scaling lacks factor", {"scaling": YARN | {"factor": None}}),
    (ValueError, r"scaling lacks factor; rope_type 'longrope'", {"scaling": LONGROPE}),
    (ValueError, r"scaling lacks low_freq_factor, high_freq_factor, orig",
     {"scaling": {"rope_type": "llama3", "factor": 2.0}}),
    (ValueError, r"scaling has mrope_section; known are ", {"scaling": {"rope_type": "default", "mrope_section": [1]}}),
    (ValueError, r"'short_factor'\] has shape \(3,\); 8 numbers",
     {"scaling": LONGROPE | {"short_factor": [1, 2, 3], "factor": 2}}),
    (ValueError, r"high_freq_factor 1.0 and low_freq_factor 4.0",
     {"scaling": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}}),
    (ValueError, r"scaling\['factor'\] is 0.0", {"scaling": LINEAR | {"factor": 0.0}}),
    (ValueError, r"scaling\['factor'\] is nan", {"scaling": LINEAR | {"factor": float("nan")}}),
    (TypeError, r"scaling\['factor'\] is '2', a str", {"scaling": LINEAR | {"factor": "2"}}),
    (TypeError, r"scaling\['rope_type'\] is 3", {"scaling": {"rope_type": 3}}),
    (TypeError, r"scaling is 'linear', a str", {"scaling": "linear"}),
    (ValueError, r"rotary_dim is 7; an even number from 2 to head_dim 16", {"rotary_dim": 7}),
    (ValueError, r"rotary_dim is 18", {"rotary_dim": 18}),
    (ValueError, r"gives 0; an even number", {"scaling": {"partial_rotary_factor": 0.05}}),
    (MemoryError, r"^RotaryEmbedding\(\): rotary_dim is 10{12}; a .*: pass a smaller head_dim", {"head_dim": 10**12}),
    (MemoryError, r"^RotaryEmbedding\(\): rotary_dim is 4611686018427387904; ", {"head_dim": 2**62}),
    (MemoryError, r"^RotaryEmbedding\(\): rotary_dim is 1180591620717411303424; ", {"head_dim": 2**70}),
    (ValueError, r"partial_rotary_factor'\] is 1.5", {"scaling": {"partial_rotary_factor": 1.5}}),
    (ValueError, r"base is -1.0", {"base": -1}),
    (ValueError, r"base is inf", {"base": float("inf")}),
    (TypeError, r"base is .*a str", {"base": "1e4"}),
    (TypeError, r"interleaved is 1", {"interleaved": 1}),
    (TypeError, r"max_position_embeddings is 4.5", {"max_position_embeddings": 4.5}),
    (ValueError, r"rotary_dim is 2 beside rope_type 'dynamic'",
     {"rotary_dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 8}}),
    (ValueError, r"base is 1 beside rope_type 'yarn'", {"base": 1, "scaling": YARN}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), CONSTRUCTORS)
def test_a_bad_construction_is_named(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        RotaryEmbedding(**{"head_dim": 16, **options})
    assert re.match(r"RotaryEmbedding\(\): .+; .+: .+", str(raised.value))


@pytest.mark.parametrize(
    ("head_dim", "factor", "rotary_dim", "dims"),
    [(48, 0.4, 19, [18, 20]), (48, 0.01, None, [2]), (48, None, 50, [48]),
     (7, None, None, [6]), (7, 1.0, None, [6]), (7, None, 9, [6])],
)  # fmt: skip
def test_the_dim_that_is_offered_works(head_dim: int, factor: Any, rotary_dim: Any, dims: list[int]) -> None:
    """Advice that leads to the next refusal is none."""
    without = "" if factor is None else ", and leave partial_rotary_factor out"
    with pytest.raises(ValueError, match=f"pass rotary_dim={' or '.join(map(str, dims))}{without}$"):
        RotaryEmbedding(head_dim, rotary_dim=rotary_dim, scaling={"partial_rotary_factor": factor})
    for dim in dims:
        assert RotaryEmbedding(head_dim, rotary_dim=dim).rotary_dim == dim


@pytest.mark.parametrize(
    ("factor", "name"), [(0.01, "partial_rotary_factor"), (0.5, "rotary_dim"), (0.3, "rotary_dim")]
)
def test_of_two_that_differ_one_that_fits_may_stay(factor: float, name: str) -> None:
    given: dict[str, Any] = {"rotary_dim": 18, "scaling": {"rope_type": "default", "partial_rotary_factor": factor}}
    with pytest.raises(ValueError, match=f"rotary_dim is 18 and .*: leave {name} out$"):
        RotaryEmbedding(48, **given)
    (given if name in given else given["scaling"]).pop(name)
    RotaryEmbedding(48, **given)


@pytest.mark.parametrize(("error", "head_dim"), [(ValueError, 1), (ValueError, 7), (TypeError, 8.0), (TypeError, None)])
def test_a_bad_head_dim(error: type[Exception], head_dim: Any) -> None:
    with pytest.raises(error, match=r"head_dim"):
        RotaryEmbedding(head_dim)


X = np.ones((2, 3, 5, 16), np.float32)
NO_WRITE = np.broadcast_to(np.float32(0), X.shape)
CALLS = [
    (ValueError, r"x has shape \(2, 3, 5, 8\); .*16\).*RotaryEmbedding\(8\)", {"x": X[..., :8]}),
    (ValueError, r"x has shape \(16,\)", {"x": X[0, 0, 0]}),
    (TypeError, r"x has dtype int64.*astype\(np.float32\)", {"x": X.astype(int)}),
    (TypeError, r"x has dtype complex64", {"x": X.astype(np.complex64)}),
    (TypeError, r"x is a masked array", {"x": np.ma.array(X)}),
    (TypeError, r"x is None", {"x": None}),
    (ValueError, r"positions has shape \(4,\); \(5,\) or \(2, 5\) was wanted", {"positions": np.arange(4)}),
    (ValueError, r"positions has shape \(1,\)", {"positions": [3]}),
    (ValueError, r"positions has shape \(\)", {"positions": np.array(3)}),
    (ValueError, r"positions has shape \(3, 5\)", {"positions": np.ones((3, 5), int)}),
    (ValueError, r"positions has shape \(2, 3, 5\)", {"positions": np.ones((2, 3, 5), int)}),
    (ValueError, r"positions has shape \(2, 5\)", {"x": X[0], "positions": np.ones((2, 5), int)}),
    (TypeError, r"positions has dtype float64; .*astype\(np.int64\)", {"positions": np.arange(5.0)}),
    (TypeError, r"positions has dtype bool", {"positions": np.ones(5, bool)}),
    (ValueError, r"out has shape \(2, 3, 5, 8\)", {"out": np.empty((2, 3, 5, 8), np.float32)}),
    (ValueError, r"out has shape \(1, 3, 5, 16\)", {"out": X[:1].copy()}),
    (TypeError, r"out has dtype float64; x's dtype float32", {"out": np.empty(X.shape)}),
    (ValueError, r"out is read-only", {"out": NO_WRITE}),
    (ValueError, r"out has elements that share memory",
     {"out": np.lib.stride_tricks.as_strided(X.copy(), X.shape, (0, 320, 64, 4))}),
    (TypeError, r"out is a list", {"out": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), CALLS)
def test_a_bad_call_is_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        RotaryEmbedding(16)(**({"x": X} | arguments))
    assert re.match(r"RotaryEmbedding\.__call__\(\): .+; .+: .+", str(raised.value))


def test_cos_sin_takes_integers_only() -> None:
    with pytest.raises(TypeError, match=r"RotaryEmbedding.cos_sin\(\): positions has dtype float64"):
        RotaryEmbedding(16).cos_sin([0.5])  # type: ignore[list-item]


def test_refuses_what_goes_round_python() -> None:
    from gqa_ext import _core

    table = np.ones((1, 8))
    for arguments in [
        (X, None, table[0], 1.0, False, None), (X, None, table.astype(np.float32), 1.0, False, None),
        (X, None, np.ones((1, 9)), 1.0, False, None), (X, None, np.ones((1, 0)), 1.0, False, None),
        (X, None, table, None, False, None), (X, None, table, 1.0, 0, None), (X, None, table),
        (X, np.arange(5, dtype=">i8"), table, 1.0, False, None),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            _core.rope(*arguments)
