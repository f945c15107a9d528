"""What must hold of any call whatever its rules, on problems that hypothesis picks.

Float64, so that two ways to one answer agree to a dozen digits; where the same bits are
promised, the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import rules
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Problem
from rules import Mix, attend

import gqa_ext

Array = NDArray[Any]
quickly = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def mixes(draw: st.DrawFn, without: tuple[str, ...] = (), dtypes: tuple[str, ...] = ("float64",)) -> Mix:
    """Any rules that go together, in any small shape."""
    names = [name for name in rules.RULES if name not in without]
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=6))
    kept: tuple[str, ...] = ()
    for name in chosen:
        kept = (*kept, name) if rules.compatible((*kept, name)) else kept
    sizes = {
        "batch": st.integers(1, 3),
        "num_kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "seq_q": st.one_of(st.integers(1, 6), st.integers(20, 70)),
        "seq_k": st.one_of(st.integers(1, 20), st.integers(100, 600)),
        "head_dim": st.integers(1, 20),
        "v_head_dim": st.integers(1, 20),
    }
    return Mix(kept, draw(st.sampled_from(dtypes)), **{name: draw(size) for name, size in sizes.items()})


def explicit(problem: Problem) -> Problem:
    """The same call with lengths and alignment said by positions alone: (B, Sq) and (B, Sk), -1 where no key is."""
    (batch,), (seq_q, seq_k) = problem.leading, problem.shape[-2:]
    p_i, p_j = np.empty((batch, seq_q), np.int64), np.empty((batch, seq_k), np.int64)
    for b in range(batch):
        p_i[b], p_j[b], _, kv_length = problem._positions((b,))
        p_j[b, kv_length:] = -1
    return replace(problem, query_positions=p_i, key_positions=p_j, causal_alignment=None, kv_lengths=None)


def close(got: tuple[Array, ...], wanted: tuple[Array, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def same(got: tuple[Array, ...], wanted: tuple[Array, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), f"{(a != b).sum()} of {a.size} differ"


@quickly
@given(mixes())
def test_positions_can_say_lengths_and_alignment(mix: Mix) -> None:
    problem = rules.problem(mix)
    close(attend(explicit(problem)), attend(problem))


def take_keys(problem: Problem, where: Any) -> Problem:
    """An explicit problem with some of its keys, in the order asked for."""
    mask = problem.attn_mask
    return replace(
        problem,
        key=problem.key[..., where, :],
        value=problem.value[..., where, :],
        key_positions=np.asarray(problem.key_positions)[..., where],
        attn_mask=None if mask is None else mask[..., where],
    )


@quickly
@given(mixes(), st.randoms(use_true_random=False))
def test_keys_in_any_order(mix: Mix, chance: Any) -> None:
    problem = explicit(rules.problem(mix))
    order = list(range(mix.seq_k))
    chance.shuffle(order)
    close(attend(take_keys(problem, order)), attend(problem))


@quickly
@given(mixes(), st.data())
def test_keys_split_anywhere_and_merged(mix: Mix, data: st.DataObject) -> None:
    """Parts of any size, some empty or without a live key; the sink goes to one of them."""
    problem = rules.problem(mix)
    whole = attend(problem)
    cuts = sorted(data.draw(st.lists(st.integers(0, mix.seq_k), max_size=4)))
    edges = [0, *cuts, mix.seq_k]
    holder = data.draw(st.integers(0, len(edges) - 2))
    parts = []
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        part = take_keys(explicit(problem), slice(first, last))
        parts.append(attend(replace(part, sinks=problem.sinks if number == holder else None)))
    outs, lses = zip(*parts, strict=True)
    close(gqa_ext.merge_attention(list(outs), list(lses)), whole)


@quickly
@given(mixes(without=("bool_mask", "float_mask", "softcap")), st.floats(-50, 50))
def test_scores_shifted(mix: Mix, shift: float) -> None:
    """A constant added to all scores and sinks moves the LSE by it and the output not at all."""
    problem = rules.problem(mix)
    out, lse = attend(problem)
    sinks = None if problem.sinks is None else np.asarray(problem.sinks, np.float64) + shift
    mask = np.full((mix.seq_q, 1), shift)
    close(attend(replace(problem, attn_mask=mask, sinks=sinks)), (out, lse + shift))


@quickly
@given(mixes(), st.integers(1, 300), st.booleans())
def test_later_keys_under_causal(mix: Mix, extra: int, poisoned: bool) -> None:
    """Keys appended past every row's position change no bit, be they garbage."""
    assume(not {"causal_lower_right", "lower_right", "key_positions"} & set(mix.rules))
    problem = replace(rules.problem(mix), is_causal=True)
    if problem.query_positions is not None:
        problem = replace(problem, query_positions=np.minimum(problem.query_positions, mix.seq_k - 1))
    assume(mix.seq_q <= mix.seq_k or problem.query_positions is not None)
    more = np.full((*problem.key.shape[:-2], extra, 1), np.nan if poisoned else 2.5)
    mask = problem.attn_mask
    if mask is not None:
        mask = np.concatenate([mask, np.repeat(mask[..., -1:], extra, axis=-1)], axis=-1)
    longer = replace(
        problem,
        key=np.concatenate([problem.key, np.repeat(more, mix.head_dim, -1)], axis=-2),
        value=np.concatenate([problem.value, np.repeat(more, mix.v_head_dim, -1)], axis=-2),
        attn_mask=mask,
    )
    same(attend(longer), attend(problem))


@quickly
@given(mixes())
def test_grouped_heads_are_repeated_heads(mix: Mix) -> None:
    """Query head h reads kv head h // group; with one head a group that is plain multi-head attention."""
    problem = rules.problem(mix)
    repeated = replace(
        problem, key=gqa_ext.repeat_kv(problem.key, mix.group), value=gqa_ext.repeat_kv(problem.value, mix.group)
    )
    close(attend(repeated), attend(problem))


@quickly
@given(mixes())
def test_heads_one_by_one(mix: Mix) -> None:
    """A call with one query head and its key head, and that head's rules."""
    problem = rules.problem(mix)
    out, lse = attend(problem)
    for h in range(mix.num_kv_heads * mix.group):
        close(attend(one_head(problem, h, h // mix.group)), (out[:, h : h + 1], lse[:, h : h + 1]))


def one_head(problem: Problem, h: int, g: int) -> Problem:
    mask, slopes, sinks = problem.attn_mask, problem.alibi_slopes, problem.sinks
    return replace(
        problem,
        query=problem.query[:, h : h + 1],
        key=problem.key[:, g : g + 1],
        value=problem.value[:, g : g + 1],
        attn_mask=mask if mask is None or mask.ndim < 3 or mask.shape[1] == 1 else mask[:, h : h + 1],
        alibi_slopes=None if slopes is None else np.asarray(slopes)[..., h : h + 1],
        sinks=None if sinks is None else np.asarray(sinks)[h : h + 1],
    )


@quickly
@given(mixes(dtypes=rules.DTYPES))
def test_sequences_one_by_one(mix: Mix) -> None:
    """Alone or in a batch: the same bits, in every dtype."""
    problem = rules.problem(mix)
    out, lse = attend(problem)
    for b in range(mix.batch):
        alone = {name: one_sequence(name, getattr(problem, name), b) for name in ARGUMENTS}
        same(attend(replace(problem, **alone)), (out[b : b + 1], lse[b : b + 1]))


PER_SEQUENCE = {"query": 4, "key": 4, "value": 4, "attn_mask": 4, "alibi_slopes": 2, "query_lengths": 1,
                "kv_lengths": 1, "query_positions": 2, "key_positions": 2}  # fmt: skip
ARGUMENTS = [field.name for field in dataclasses.fields(Problem) if field.name in PER_SEQUENCE]


def one_sequence(name: str, x: Any, b: int) -> Any:
    """An argument's part for sequence b, where it has one for each."""
    return x if x is None or np.ndim(x) < PER_SEQUENCE[name] else np.asarray(x)[b : b + 1]


@quickly
@given(mixes(dtypes=("float32", "float64")))
def test_outputs_are_means(mix: Mix) -> None:
    """No output lies outside the values; with a sink, nor outside what they and 0 span."""
    problem = rules.problem(mix)
    out, lse = attend(problem)
    value = np.repeat(problem.value, mix.group, axis=1)
    low, high = value.min(axis=-2, keepdims=True), value.max(axis=-2, keepdims=True)
    empty = ~(lse > -np.inf)
    pulled = np.broadcast_to(empty[..., None] | (problem.sinks is not None), out.shape)
    rounding = 1e-5 if mix.dtype == "float32" else 1e-13
    assert (out >= np.where(pulled, np.minimum(low, 0), low) - rounding).all()
    assert (out <= np.where(pulled, np.maximum(high, 0), high) + rounding).all()


@quickly
@given(mixes())
def test_weights_are_what_multiplies_the_values(mix: Mix) -> None:
    """As the oracle has them; weights @ repeat_kv(value) is the output, and asking for them changes no bit of it."""
    problem = rules.problem(mix)
    out, lse, weights = attend(problem, return_weights=True)
    same((out, lse), attend(problem))
    expected = problem.attention()
    np.testing.assert_allclose(weights, expected.weights, rtol=1e-6, atol=1e-12)  # they are float32
    assert not weights[expected.weights == 0].any()
    np.testing.assert_allclose(weights @ gqa_ext.repeat_kv(problem.value, mix.group), out, rtol=1e-5, atol=1e-5)


@quickly
@given(mixes(), st.floats(-3, 3))
def test_linear_in_value(mix: Mix, factor: float) -> None:
    problem = rules.problem(mix)
    other = np.random.default_rng(1).standard_normal(problem.value.shape)
    out, lse = attend(problem)
    more, _ = attend(replace(problem, value=other))
    both = attend(replace(problem, value=problem.value + factor * other))
    close(both, (out + factor * more, lse))


@quickly
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(rules.DTYPES), st.data())
def test_merge_takes_any_parts(parts: int, rows: int, dtype: str, data: st.DataObject) -> None:
    """Against the same in float64; a part with LSE -inf is dropped whatever its output holds."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    wide = np.float64 if dtype == "float64" else np.float32
    outs = [rng.standard_normal((2, rows, 5)).astype(rules.dtype_of(dtype)) for _ in range(parts)]
    lses = [(10 * rng.standard_normal((2, rows))).astype(wide) for _ in range(parts)]
    for out, lse in zip(outs, lses, strict=True):
        gone = rng.random(lse.shape) < 0.3
        out[gone], lse[gone] = np.nan, -np.inf
    got, got_lse = gqa_ext.merge_attention(outs, lses)
    stacked = np.stack(lses).astype(np.float64)
    top = np.where(np.isfinite(stacked.max(0)), stacked.max(0), 0)
    with np.errstate(divide="ignore"):
        wanted_lse = top + np.log(np.exp(stacked - top).sum(0))
    share = np.exp(stacked - np.where(np.isfinite(wanted_lse), wanted_lse, 0))
    clean = np.where(share[..., None] > 0, np.stack(outs).astype(np.float64), 0)
    wanted = (share[..., None] * clean).sum(0)
    eps = float(np.finfo(wide).eps) * 40 + (2.0**-8 if dtype == "bfloat16" else 2.0**-11 if dtype == "float16" else 0)
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=eps, atol=eps)
    np.testing.assert_allclose(got_lse, wanted_lse, rtol=1e-5, atol=1e-5)
    assert got.dtype == outs[0].dtype
    assert got_lse.dtype == wide
