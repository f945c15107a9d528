"""Every rule beside every other against the float64 oracle, and what each rule means at its edges.

The oracle states order and meaning (reference.py); bounds.py says how near is near enough.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rules
from numpy.typing import NDArray
from reference import Problem
from rules import DTYPES, Mix, agree, agree_mix, attend, dtype_of

import gqa_ext

Array = NDArray[Any]
ROWS = (1, 3, 64)  # keys in lanes, few rows, row tiles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", ROWS)
@pytest.mark.parametrize("pair", rules.pairs(), ids="+".join)
def test_all_pairs(pair: tuple[str, ...], seq_q: int, dtype: str, isa: str) -> None:
    agree_mix(Mix(pair, dtype, seq_q=seq_q), isa)


@pytest.mark.quick
@pytest.mark.parametrize("seq_q", ROWS)
@pytest.mark.parametrize("rule", rules.RULES)
def test_each_rule_over_key_splits(rule: str, seq_q: int, isa: str) -> None:
    """Keys enough for several tiles and splits, some of them without a live slot."""
    agree_mix(Mix((rule,), batch=1, num_kv_heads=1, seq_q=seq_q, seq_k=4200, head_dim=9), isa)


def medleys() -> list[Mix]:
    """Three to nine rules at once over sizes of all kinds, by seeded chance."""
    chance = random.Random("medleys")
    mixes: list[Mix] = []
    while len(mixes) < 150:
        names = tuple(sorted(chance.sample(list(rules.RULES), chance.randint(3, 9))))
        mix = Mix(names, chance.choice(DTYPES), chance.choice((1, 2, 3)), chance.choice((1, 2)), chance.choice((1, 3)))
        mix = replace(mix, seq_q=chance.choice((1, 2, 5, 17, 49, 130)), seq_k=chance.choice((1, 4, 33, 129, 300, 700)))
        if rules.compatible(names):
            mixes.append(replace(mix, head_dim=chance.choice((1, 8, 33, 64)), v_head_dim=chance.choice((1, 16, 40))))
    return mixes


@pytest.mark.parametrize("mix", medleys(), ids=str)
def test_medleys(mix: Mix, isa: str) -> None:
    agree_mix(mix, isa)


def same(got: tuple[Array, ...], wanted: tuple[Array, ...]) -> None:
    """To the bit."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


NEUTRAL: list[dict[str, Any]] = [
    {"window": None},
    {"window": (None, None)},
    {"window": (10**6, 10**6)},
    {"window": (2**62, 2**62)},
    {"softcap": None},
    {"softcap": 0},
    {"softcap": 0.0},
    {"alibi_slopes": np.zeros(4, np.float32)},
    {"sinks": np.full(4, -np.inf, np.float32)},
    {"query_lengths": 3},
    {"kv_lengths": np.array([150, 150])},
    {"query_positions": np.arange(3), "is_causal": False},
    {"key_positions": np.arange(150)},
    {"causal_alignment": "lower_right"},
    {"causal_alignment": "upper_left"},
]


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_a_rule_that_changes_nothing(more: dict[str, Any]) -> None:
    plain = rules.problem(Mix())
    for a, b in zip(attend(replace(plain, **more)), attend(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seq_q", ROWS)
def test_a_window_is_what_its_mask_says(seq_q: int, isa: str) -> None:
    """Both ends count: (l, r) keeps l keys before a row's own, that one, and r after it."""
    plain = rules.problem(Mix(seq_q=seq_q))
    distance = np.arange(150) - np.arange(seq_q)[:, None]
    for left, right in ((0, 0), (1, 0), (0, 1), (7, 30), (130, 2), (None, 0), (3, None)):
        mask = (distance >= -(left if left is not None else 10**9)) & (distance <= (10**9 if right is None else right))
        out, lse = attend(replace(plain, window=(left, right)))
        wanted_out, wanted_lse = attend(replace(plain, attn_mask=mask))
        np.testing.assert_allclose(out, wanted_out, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", ROWS)
def test_rows_without_a_key(seq_q: int, dtype: str, isa: str) -> None:
    """0 and -inf; with a sink, 0 and the sink; rows past query_lengths 0 and -inf whatever the sink."""
    plain = rules.problem(Mix((), dtype, seq_q=seq_q))
    sinks = np.array([0.5, -3.0, 40.0, -np.inf], np.float32)
    empties: list[dict[str, Any]] = [
        {"kv_lengths": 0},
        {"key_positions": np.full(150, -1)},
        {"attn_mask": np.zeros((seq_q, 150), bool)},
        {"attn_mask": np.full((seq_q, 150), -np.inf, np.float32)},
        {"window": (0, 0), "query_positions": np.full(seq_q, 1000)},
        {"is_causal": True, "query_positions": np.full(seq_q, -1)},
    ]
    for empty in empties:
        out, lse = attend(replace(plain, **empty))
        assert not out.any()
        assert (lse == -np.inf).all()
        out, lse = attend(replace(plain, **empty, sinks=sinks))
        assert not out.any()
        assert (lse == sinks[:, None]).all()
        out, lse = attend(replace(plain, **empty, sinks=sinks, query_lengths=0))
        assert not out.any()
        assert (lse == -np.inf).all()


def test_a_sink_takes_its_share(isa: str) -> None:
    """A sink equal to the LSE halves the output; a huge one leaves next to nothing, a tiny one all."""
    plain = rules.problem(Mix(batch=1, num_kv_heads=1, group=1, seq_q=1))
    out, lse = attend(plain)
    halved, more = attend(replace(plain, sinks=lse[0, :, 0]))
    np.testing.assert_allclose(halved, out / 2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(more, lse + np.log(2), rtol=1e-6)
    for sink, share in ((-1e30, 1.0), (-200.0, 1.0), (200.0, 0.0), (3e38, 0.0)):
        got, lse_of = attend(replace(plain, sinks=np.array([sink], np.float32)))
        np.testing.assert_allclose(got, out * share, rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(lse_of, lse if share else sink, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sinks_and_slopes_of_any_float_dtype(dtype: str) -> None:
    """Values that every dtype holds, so the answers are the same bits."""
    plain = rules.problem(Mix())
    values = np.array([0.5, -1.25, 3.0, 0.0])
    for name in ("sinks", "alibi_slopes"):
        same(attend(replace(plain, **{name: values.astype(dtype_of(dtype))})), attend(replace(plain, **{name: values})))


@pytest.mark.parametrize("seq_q", ROWS)
def test_alibi_is_the_mask_it_stands_for(seq_q: int, isa: str) -> None:
    """Distance is between positions, so it follows the alignment and the lengths."""
    plain = rules.problem(Mix(seq_q=seq_q))
    slopes = np.array([0.25, 0.5, 0.0, -0.125], np.float32)
    lengths = np.array([90, 150])
    i, j = np.arange(seq_q)[:, None], np.arange(150)
    for alignment, first in (("upper_left", np.zeros(2, int)), ("lower_right", lengths - seq_q)):
        distance = np.abs(i + first[:, None, None, None] - j)
        given = replace(plain, kv_lengths=lengths, causal_alignment=alignment)
        out, lse = attend(replace(given, alibi_slopes=slopes))
        mask = (-slopes[:, None, None] * distance).astype(np.float32)
        wanted_out, wanted_lse = attend(replace(given, attn_mask=mask))
        np.testing.assert_allclose(out, wanted_out, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(lse, wanted_lse, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_positions_and_lengths_of_any_integer_dtype(name: str) -> None:
    plain = rules.problem(Mix(seq_k=100))
    given = {
        "query_lengths": np.array([2, 3]),
        "kv_lengths": np.array([77, 100]),
        "query_positions": np.array([[5, 90, 40], [7, 8, 9]]),
        "key_positions": np.arange(100)[::-1],
    }
    plain = replace(plain, is_causal=True, window=(30, None))
    wanted = attend(replace(plain, **given))
    same(attend(replace(plain, **{k: v.astype(name) for k, v in given.items()})), wanted)
    same(attend(replace(plain, **{k: v.tolist() for k, v in given.items()})), wanted)


@pytest.mark.parametrize("seq_q", ROWS)
def test_only_differences_of_positions_count(seq_q: int, isa: str) -> None:
    """However far from 0 they are."""
    mix = Mix(seq_q=seq_q)
    rng = np.random.default_rng(seq_q)
    plain = replace(rules.problem(mix), is_causal=True, window=(60, 10), alibi_slopes=np.full(4, 0.125, np.float32))
    p_i, p_j = rng.integers(0, 150, seq_q), rng.integers(0, 150, 150)
    near = attend(replace(plain, query_positions=p_i, key_positions=p_j))
    for offset in (1, 10**6, 2**31 + 5, 2**40, 2**62):
        same(attend(replace(plain, query_positions=p_i + offset, key_positions=p_j + offset)), near)


def test_far_ends_of_int64_do_not_wrap() -> None:
    """No sum of a position and a window's side passes the end of the integers in silence."""
    plain = rules.problem(Mix(batch=1, num_kv_heads=1, group=1, seq_q=2, seq_k=4))
    top = 2**63 - 1
    far = replace(plain, query_positions=np.array([top, -top - 1]), key_positions=np.array([0, 1, top - 1, top]))
    for window, live in (((5, 5), (2, 3)), ((None, 5), (0, 1, 2, 3)), ((2**62, 2**62), (2, 3))):
        _, lse = attend(replace(far, window=window))
        keep = np.isin(np.arange(4), live)[None]
        _, wanted = attend(replace(plain, attn_mask=keep))
        np.testing.assert_allclose(lse[..., 0], wanted[..., 0], rtol=1e-6)
    _, lse = attend(replace(far, is_causal=True))
    assert (lse[..., 1] == -np.inf).all()
    assert np.isfinite(lse[..., 0]).all()


def test_alibi_beside_keys_far_away(isa: str) -> None:
    """A distance is as exact as float32 can hold it, whatever lies at the other keys of its tile."""
    plain = rules.problem(Mix(seq_k=40))
    p_j = 2**30 + np.arange(40)
    p_i = 2**30 + np.array([3, 20, 39])
    slopes = np.full(4, 0.25, np.float32)
    for first in (-1, 0, 7):  # absent, or far from all others: it weighs nothing
        given = replace(plain, query_positions=p_i, key_positions=np.r_[first, p_j[1:]], alibi_slopes=slopes)
        out, lse = agree(given, isa, f"first key at {first}")
        near, near_lse = attend(replace(given, key_positions=np.r_[-1, p_j[1:]]))
        np.testing.assert_allclose(out, near, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, near_lse, rtol=1e-6)


DROPPING = ("window", "kv_lengths", "key_positions", "bool_mask", "float_mask", "causal", "causal_lower_right")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", ROWS)
@pytest.mark.parametrize("rule", DROPPING)
def test_poison_reaches_live_rows_only(rule: str, seq_q: int, dtype: str, poison: float, isa: str) -> None:
    """Three keys of NaN or inf: the oracle says which rows they reach, and all others are as ever."""
    mix = Mix((rule, "sinks"), dtype, seq_q=seq_q, seq_k=90)
    clean = rules.problem(mix)
    key, value = clean.key.copy(), clean.value.copy()
    for j in (2, 40, 88):
        key[..., j, :], value[..., j, :] = poison, poison
    for foul in (replace(clean, key=key), replace(clean, value=value), replace(clean, key=key, value=value)):
        agree(foul, isa, f"{mix} {poison}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seq_q", [2, 64])
def test_extremes(seq_q: int, dtype: str, isa: str) -> None:
    """Caps of every size, scores past the range, and infinities or NaN in what is live."""
    plain = rules.problem(Mix((), dtype, seq_q=seq_q))
    kind = np.dtype(dtype).type
    for softcap in (1e-30, 1e-5, 3.0, 1e4, 1e30):
        agree(replace(plain, softcap=softcap), isa, f"softcap {softcap}")
        agree(replace(plain, softcap=softcap, query=plain.query * kind(1e-20)), isa, f"softcap {softcap}, tiny scores")
    large = kind(1e20 if dtype == "float32" else 1e160)
    query, key = np.abs(plain.query) * large, np.abs(plain.key) * np.sign(plain.key[..., :1]) * large
    agree(replace(plain, query=query, key=key, softcap=2.0), isa, "a capped infinity is the cap")
    agree(replace(plain, query=query, key=-np.abs(key)), isa, "scores of -inf weigh nothing")
    for foul in (np.nan, np.inf):
        mask = np.zeros((seq_q, 150), np.float32)
        mask[1, 7] = foul
        agree(replace(plain, attn_mask=mask), isa, f"mask {foul}")
        agree(replace(plain, attn_mask=mask, window=(0, 0)), isa, f"mask {foul} outside the window")
        agree(replace(plain, sinks=np.array([foul, 0, 1, 2])), isa, f"sink {foul}")
    agree(replace(plain, alibi_slopes=np.array([1e38, 1e30, -1e30, 1e-40])), isa, "slopes")
    low = np.full((seq_q, 150), -1e9, np.float32)
    agree(replace(plain, attn_mask=low, window=(3, 3), sinks=np.zeros(4)), isa, "all of -1e9 beside a sink")


def test_slopes_as_published() -> None:
    """Press et al., "Train Short, Test Long" (ICLR 2022): 2**(-8 i / n), and their way with other head counts."""
    np.testing.assert_array_equal(gqa_ext.get_alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(gqa_ext.get_alibi_slopes(16), 2.0 ** -(np.arange(1, 17) / 2), rtol=1e-6)
    twelve = [*(2.0 ** -np.arange(1, 9)), *(2.0 ** -(np.arange(1, 9, 2) / 2))]
    np.testing.assert_allclose(gqa_ext.get_alibi_slopes(12), twelve, rtol=1e-6)
    for n in range(1, 70):
        assert gqa_ext.get_alibi_slopes(n).shape == (n,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_left_alone(dtype: str) -> None:
    """Nothing is written but the output, whatever the rules, and read-only arrays will do."""
    names = ("window", "softcap", "alibi", "sinks", "query_lengths", "kv_lengths", "key_positions", "float_mask")
    given = rules.problem(Mix(names, dtype))
    arrays = [x for x in vars(given).values() if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in arrays]
    frozen = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in vars(given).items()}
    for x in frozen.values():
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    same(attend(Problem(**frozen)), attend(given))
    assert before == [x.tobytes() for x in arrays]


def test_rules_of_strided_and_swapped_arrays() -> None:
    """Sinks, slopes, lengths and positions lie as they like."""
    names = ("alibi", "sinks", "query_lengths", "kv_lengths", "query_positions", "key_positions")
    given = rules.problem(Mix(names))
    odd: dict[str, Any] = {}
    for name in ("alibi_slopes", "sinks", "query_lengths", "kv_lengths", "query_positions", "key_positions"):
        x = getattr(given, name)
        spread = np.repeat(x.astype(x.dtype.newbyteorder()), 2, axis=-1)[..., ::2]
        odd[name] = np.flip(np.ascontiguousarray(np.flip(spread, -1)), -1)
    same(attend(replace(given, **odd)), attend(given))


@pytest.mark.parametrize("far", [2**24 + 2, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_alibi_beside_rows_far_away(far: int, isa: str) -> None:
    """A row that stands far from all others, padding perhaps, takes no distance from its neighbours."""
    plain = rules.problem(Mix(seq_q=11, seq_k=40))
    slopes = np.full(4, 0.5, np.float32)
    given = replace(plain, query_positions=np.r_[far, 1:11], alibi_slopes=slopes)
    out, lse = attend(given)
    near, near_lse = attend(replace(given, query_positions=np.r_[0, 1:11]))
    np.testing.assert_allclose(out[..., 1:, :], near[..., 1:, :], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[..., 1:], near_lse[..., 1:], rtol=1e-5)


@pytest.mark.parametrize("far", [-(2**63), 2**63 - 1])
def test_open_sides_have_no_end(far: int, isa: str) -> None:
    plain = rules.problem(Mix(seq_q=3, seq_k=40))
    wanted, wanted_lse = attend(plain)
    out, lse = attend(replace(plain, query_positions=np.array([far, 1, 2])))
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
