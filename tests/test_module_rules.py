"""The layer's rules against the float64 oracle: what the constructor says of scores, and kv_lengths of a call."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import reference

import gqa_ext
from gqa_ext import GroupedQueryAttention, MultiHeadAttention, get_alibi_slopes

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
RNG = np.random.default_rng(0)
SINKS = RNG.standard_normal(8)
RULES: list[dict[str, Any]] = [
    {"window": (2, 1)},
    {"window": (None, 0)},
    {"window": [0, None]},
    {"softcap": 1.5},
    {"alibi_slopes": get_alibi_slopes(8)},
    {"alibi_slopes": RNG.random((3, 8))},
    {"sinks": SINKS},
    {"sinks": np.full(8, -np.inf)},
    {"window": (3, 2), "softcap": 2, "alibi_slopes": [0.1] * 8, "sinks": SINKS, "scale": 0.7},
]


def by_oracle(layer: GroupedQueryAttention, query: Any, key: Any, **rules: Any) -> tuple[np.ndarray, np.ndarray]:
    """The layer in float64: out and weights."""

    def heads(linear: Any, x: np.ndarray, count: int) -> np.ndarray:
        y = x.astype(np.float64) @ linear.weight.T.astype(np.float64)
        return y.reshape(*x.shape[:-1], count, -1).swapaxes(-2, -3)

    attended = reference.attention(
        heads(layer.q_proj, query, layer.num_heads),
        heads(layer.k_proj, key, layer.num_kv_heads),
        heads(layer.v_proj, key, layer.num_kv_heads),
        **rules,
    )
    joined = attended.out.swapaxes(-2, -3).reshape(*query.shape[:-1], -1)
    return joined @ layer.o_proj.weight.T.astype(np.float64), attended.weights


def inputs(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"kv_lengths": [7, 0, 3]}, {"kv_lengths": 4}], ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_rule_in_the_output_and_in_the_weights(rules: dict[str, Any], call: dict[str, Any], dtype: str) -> None:
    layer = GroupedQueryAttention(32, 8, 2, rng=0, dtype=dtype, **rules)
    query, key = inputs(3, 7, 32, dtype=dtype), inputs(3, 7, 32, dtype=dtype)[::-1]
    out, weights = layer(query, key, need_weights=True, **call)
    for mine, theirs in zip((out, weights), by_oracle(layer, query, key, **rules, **call), strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)
    np.testing.assert_array_equal(layer(query, key, **call), out)


def test_rules_beside_masks_and_head_mask() -> None:
    layer = GroupedQueryAttention(32, 8, 2, rng=0, **RULES[-1])
    query, key = inputs(3, 5, 32), inputs(3, 9, 32)
    mask = np.where(RNG.random((3, 1, 5, 9)) < 0.3, -np.inf, RNG.standard_normal((3, 1, 5, 9)))
    factors = np.arange(8.0)
    _, weights = layer(query, key, attn_mask=mask, kv_lengths=[9, 4, 1], head_mask=factors, need_weights=True)
    _, want = by_oracle(layer, query, key, attn_mask=mask, kv_lengths=[9, 4, 1], **RULES[-1])
    np.testing.assert_allclose(weights, want * factors[:, None, None], **TOLERANCE)


def test_a_padded_batch_is_its_sequences() -> None:
    """And nothing behind a length matters, NaN included."""
    layer = GroupedQueryAttention(32, 8, 2, rng=0, **RULES[-1])
    x, lengths = inputs(3, 9, 32), [9, 4, 6]
    for b, length in enumerate(lengths):
        x[b, length:] = np.nan
    with np.errstate(invalid="ignore"):  # NumPy's product of NaN
        out, weights = layer(x, kv_lengths=lengths, need_weights=True)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(out[b, :length], layer(x[b, :length]), **TOLERANCE)
        assert (weights[b, :, :length, length:] == 0).all()


def test_without_batch_and_with_one_that_is_shared() -> None:
    layer = GroupedQueryAttention(16, 4, 2, rng=0, window=(1, 1))
    query, key = inputs(4, 16), inputs(6, 16)
    out, weights = layer(query, key, kv_lengths=3, need_weights=True)
    assert weights.shape == (4, 4, 6)
    np.testing.assert_array_equal(layer(query[None], key[None], kv_lengths=[3])[0], out)
    values = np.stack([key, -key])
    both, weights = layer(query[None], key[None], values, kv_lengths=[3, 2], need_weights=True)
    assert weights.shape == (2, 4, 4, 6)
    np.testing.assert_allclose(both[0], out, **TOLERANCE)
    np.testing.assert_allclose(-both[1], layer(query, key, kv_lengths=2), **TOLERANCE)


# ---- dropout ----


def test_dropout_is_for_training_and_is_in_the_weights() -> None:
    x = inputs(3, 20, 32)
    layer = GroupedQueryAttention(32, 8, 2, rng=0, dropout=0.25, softcap=5.0)
    plain = GroupedQueryAttention(32, 8, 2, rng=0, softcap=5.0)
    np.testing.assert_array_equal(layer(x), plain(x))
    out, weights = layer.train()(x, need_weights=True)
    _, whole = plain.train()(x, need_weights=True)
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], (whole / 0.75)[kept], rtol=1e-5)
    assert 0.2 < 1 - kept.mean() < 0.3
    values = layer.v_proj(x).reshape(3, 20, 2, 4).swapaxes(1, 2).repeat(4, axis=1)
    again = layer.o_proj((weights @ values).swapaxes(1, 2).reshape(3, 20, 32))
    np.testing.assert_allclose(out, again, **TOLERANCE)
    np.testing.assert_array_equal(layer.eval()(x), plain(x))


def test_every_call_drops_others_and_a_seed_repeats_them() -> None:
    x = inputs(2, 9, 32)

    def calls(rng: Any) -> list[np.ndarray]:
        layer = GroupedQueryAttention(32, 8, 2, rng=rng, dropout=0.5).train()
        return [layer(x) for _ in range(3)]

    first, again = calls(3), calls(np.random.default_rng(3))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    everything = GroupedQueryAttention(32, 8, 2, dropout=1.0).train()
    assert not everything(x).any()


# ---- the parameter, repr, from_mha ----


def test_sinks_are_a_parameter() -> None:
    layer = GroupedQueryAttention(32, 8, 2, rng=0, sinks=SINKS)
    assert layer.sinks.dtype == np.float32
    assert list(layer.state_dict("attn."))[-1] == "attn.sinks"
    assert layer.state_dict()["sinks"] is layer.sinks
    assert layer.num_parameters() == GroupedQueryAttention(32, 8, 2).num_parameters() + 8
    other = GroupedQueryAttention(32, 8, 2, rng=1, sinks=np.zeros(8, np.float16))
    other.load_state_dict(layer.state_dict())
    x = inputs(2, 5, 32)
    np.testing.assert_array_equal(other(x), layer(x))
    with pytest.raises(ValueError, match="unexpected sinks"):
        GroupedQueryAttention(32, 8, 2).load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"misshaped sinks \(7,\) where \(8,\)"):
        layer.load_state_dict(layer.state_dict() | {"sinks": SINKS[:7]})
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(same(x), layer(x))
        assert same.sinks is not layer.sinks


def test_the_callers_arrays_are_not_kept() -> None:
    sinks, slopes = SINKS.astype(np.float32), get_alibi_slopes(8)
    layer = GroupedQueryAttention(32, 8, 2, sinks=sinks, alibi_slopes=slopes)
    sinks[:], slopes[:] = np.nan, np.nan
    assert np.isfinite(layer(inputs(2, 32))).all()


@pytest.mark.parametrize(
    "text",
    [
        "GroupedQueryAttention(16, 4, 2, window=(511, 0), softcap=50.0)",
        "GroupedQueryAttention(16, 4, 2, window=(None, 3), alibi_slopes=[0.25, 0.1, 0.015625, 0.00390625])",
        "MultiHeadAttention(8, 2, alibi_slopes=[[0.5, 0.1], [0.0, 1.0]], sinks=[0.1, -1.5])",
        "MultiQueryAttention(8, 2, dropout=0.1, sinks=[0.1, 1e-20], dtype='float64')",
    ],
)
def test_repr_is_the_call(text: str) -> None:
    assert repr(eval(text, vars(gqa_ext))) == text


def test_what_is_off_is_not_in_repr() -> None:
    layer = GroupedQueryAttention(8, 2, 1, window=None, softcap=0, alibi_slopes=None, sinks=None)
    assert repr(layer) == "GroupedQueryAttention(8, 2, 1)"


def test_from_mha_keeps_the_rules() -> None:
    mha = MultiHeadAttention(32, 8, rng=0, **RULES[-1])
    layer, x = GroupedQueryAttention.from_mha(mha, 8), inputs(2, 5, 32)
    np.testing.assert_array_equal(layer(x), mha(x))
    assert repr(layer).partition("window")[2] == repr(mha).partition("window")[2] != ""
    state = GroupedQueryAttention.from_mha(mha.state_dict(), 2, num_heads=8)
    np.testing.assert_array_equal(state.sinks, mha.sinks)
    assert state.sinks is not mha.sinks
    with pytest.raises(ValueError, match=r"sinks \(3,\)"):
        GroupedQueryAttention.from_mha(mha.state_dict() | {"sinks": SINKS[:3]}, 2, num_heads=8)


# ---- refusals ----

CONSTRUCTORS = [
    (ValueError, r"window is \(-1, 0\); .*FlashAttention.*: pass window=\(None, 0\)", {"window": (-1, 0)}),
    (TypeError, r"window is 4, an int; .*: pass window=\(4, 0\)", {"window": 4}),
    (ValueError, r"softcap is -1.0; a finite number of at least 0", {"softcap": -1}),
    (ValueError, r"alibi_slopes has shape \(7,\); \(num_heads,\) = \(8,\)", {"alibi_slopes": np.ones(7)}),
    (ValueError, r"alibi_slopes has shape \(\)", {"alibi_slopes": 0.5}),
    (ValueError, r"alibi_slopes has a NaN", {"alibi_slopes": [np.nan] * 8}),
    (ValueError, r"sinks has shape \(2,\); one logit for each query head, \(8,\)", {"sinks": np.zeros(2)}),
    (TypeError, r"sinks has dtype complex128", {"sinks": np.zeros(8, complex)}),
    (TypeError, r"sinks is True", {"sinks": True}),
]


@pytest.mark.parametrize(("error", "message", "options"), CONSTRUCTORS)
def test_a_bad_construction_is_named(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        GroupedQueryAttention(128, 8, 2, **options)
    assert re.match(r"GroupedQueryAttention\(\): .+; .+: .+", str(raised.value))


CALLS = [
    (ValueError, r"kv_lengths\[1\] is 6; from 0 to the number of key rows, 5", {"kv_lengths": [3, 6]}),
    (ValueError, r"kv_lengths has shape \(3,\)", {"kv_lengths": [3, 5, 1]}),
    (TypeError, r"kv_lengths has dtype float64", {"kv_lengths": [3.0, 5.0]}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), CALLS)
def test_a_bad_call_is_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        GroupedQueryAttention(16, 4, 2)(inputs(2, 5, 16), **arguments)
