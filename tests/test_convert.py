"""convert.pool_heads: the exact mean rounded once, from arrays however they lie."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gqa_ext import get_num_threads, set_num_threads
from gqa_ext.convert import pool_heads

DTYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
FORMATS = {"float16": (10, 15), "bfloat16": (7, 127), "float32": (23, 127)}  # fraction bits, largest exponent


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return request.param


def nearest(exact: Fraction, dtype: np.dtype[Any]) -> float:
    """The number of dtype next to an exact one, ties to even, by integer arithmetic."""
    fraction_bits, largest = FORMATS[dtype.name]
    size = abs(exact)
    exponent = 1 - largest
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - fraction_bits)
    rounded = round(size / unit) * unit
    value = math.inf if rounded >= Fraction(2) ** (largest + 1) else float(rounded)
    return math.copysign(value, exact) if exact else 0.0


def draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Values of a kind: usual ones, any bits, sums that end beside a tie, sums that cancel."""
    if kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if kind == "bits":
        bits = rng.integers(0, 2**64, shape, np.uint64) >> np.uint64(64 - 8 * dtype.itemsize)
        return bits.astype(f"u{dtype.itemsize}").view(dtype)
    if kind == "ties":
        values = 1 + rng.integers(-4, 5, shape) * 2.0 ** -rng.integers(5, 30, shape)
        tiny = rng.choice([-1, 1], shape) * 2.0 ** -rng.integers(20, 90, shape)
        return np.where(rng.random(shape) < 0.3, tiny, values).astype(dtype)
    return (rng.choice([-1, 1], shape) * 2.0 ** rng.choice([15, 3, 0, -20], shape)).astype(dtype)


def exact_mean(column: np.ndarray, dtype: np.dtype[Any]) -> float:
    """Of a column with or without inf and NaN."""
    numbers = column.astype(np.float64)
    if not np.isfinite(numbers).all():
        with np.errstate(invalid="ignore"):
            return float(numbers.sum())
    return nearest(sum(map(Fraction, numbers.tolist()), Fraction(0)) / len(numbers), dtype)


# ---- the mean ----


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["normal", "bits", "ties", "cancel"])
@pytest.mark.parametrize("heads", [2, 3, 4, 7, 71])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_mean_is_exact_and_rounded_once(dtype: np.dtype[Any], kind: str, heads: int) -> None:
    weight = draw(np.random.default_rng(heads), kind, (2 * heads, 20), dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN among the random bits
        got = pool_heads(weight, 2 * heads, 2).astype(np.float64)
        want = [[exact_mean(column, dtype) for column in group.T] for group in weight.reshape(2, heads, 20)]
    np.testing.assert_array_equal(got, want)


def test_a_tie_is_broken_by_what_float32_cannot_hold() -> None:
    weight = np.array([[8192], [4], [2.0**-24], [0]], np.float16)  # mean 2049 + 2^-26; float16 has 2048 and 2050
    assert pool_heads(weight, 4, 1)[0, 0] == 2050
    assert np.float16(np.float32(2049 + 2.0**-26)) == 2048


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_tie_is_broken_by_what_float64_cannot_hold(sign: int) -> None:
    weight = np.array([[4], [2.0**-22], [sign * 2.0**-80], [0]], np.float32)  # mean 1 + 2^-24 +- 2^-82
    assert pool_heads(weight, 4, 1)[0, 0] == (1 + 2.0**-23 if sign > 0 else 1)


def test_float64_sums_in_the_order_of_the_group() -> None:
    weight = np.random.default_rng(0).standard_normal((12, 5, 300))
    groups = [[3, 0, 8, 11], [1, 2, 4, 5], [10, 9, 7, 6]]
    want = [(((weight[a] + weight[b]) + weight[c]) + weight[d]) / 4 for a, b, c, d in groups]
    got = pool_heads(weight.reshape(60, 300), 12, 3, groups=groups)
    np.testing.assert_array_equal(got, np.reshape(want, (15, 300)))


def test_a_sum_that_overflows_has_a_mean(dtype: np.dtype[Any]) -> None:
    largest = ml_dtypes.finfo(dtype).max
    weight = np.array([largest, largest, largest, -largest, np.inf, largest], dtype)
    np.testing.assert_array_equal(pool_heads(weight, 6, 3), np.array([largest, 0, np.inf], dtype))


def test_subnormal_numbers_and_signs_of_zero(dtype: np.dtype[Any]) -> None:
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    weight = np.array([tiny, 0, 3 * tiny, 0, -0.0, -0.0, -0.0, 0.0], dtype)
    got = pool_heads(weight, 8, 4)  # halves of 1 and 3 units tie to even: 0 and 2
    np.testing.assert_array_equal(got, np.array([0, 2 * tiny, 0, 0], dtype))
    assert np.signbit(got.astype(float)).tolist() == [False, False, True, False]


def test_nan_and_inf_stay_in_their_group_and_column(dtype: np.dtype[Any]) -> None:
    weight = np.ones((4, 3), dtype)
    weight[0, 0], weight[1, 1], weight[2, 2] = np.nan, np.inf, -np.inf
    want = np.array([[np.nan, np.inf, 1], [1, 1, -np.inf]])
    np.testing.assert_array_equal(pool_heads(weight, 4, 2).astype(float), want)


# ---- same bits ----


def test_one_head_a_group_keeps_every_bit(dtype: np.dtype[Any]) -> None:
    integer = f"u{dtype.itemsize}"
    bits = np.arange(65536, dtype=np.uint64) << np.uint64(8 * dtype.itemsize - 16)
    weight = bits.astype(integer).view(dtype).reshape(64, 1024)
    same = pool_heads(weight, 16, 16)
    assert same is not weight
    np.testing.assert_array_equal(same.view(integer), weight.view(integer))
    weighted = pool_heads(weight, 16, 16, weights=np.arange(1, 17))
    np.testing.assert_array_equal(weighted.view(integer), weight.view(integer))


def test_first_copies_the_first_head_of_each_group(dtype: np.dtype[Any]) -> None:
    weight = draw(np.random.default_rng(1), "bits", (6, 2, 50), dtype)
    got = pool_heads(weight.reshape(12, 50), 6, 2, method="first", groups=[[4, 0, 1], [5, 3, 2]])
    assert got.tobytes() == weight[[4, 5]].tobytes()


def test_any_number_of_threads_gives_the_same_bits(dtype: np.dtype[Any]) -> None:
    weight = draw(np.random.default_rng(2), "normal", (24 * 64, 700), dtype)
    before, results = get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            set_num_threads(threads)
            results.append(pool_heads(weight, 24, 8).tobytes())
    finally:
        set_num_threads(before)
    assert len(set(results)) == 1


# ---- arrays however they lie ----


def by_numpy(weight: np.ndarray, num_heads: int, num_kv_heads: int, axis: int) -> np.ndarray:
    """The mean where sums of few numbers of similar size are exact."""
    rows = np.moveaxis(weight.astype(np.float64), axis, 0)
    groups = rows.reshape(num_kv_heads, num_heads // num_kv_heads, -1, *rows.shape[1:])
    pooled = groups.sum(axis=1) / groups.shape[1]
    return np.moveaxis(pooled.reshape(-1, *rows.shape[1:]), 0, axis).astype(weight.dtype.newbyteorder("="))


LAYOUTS = {
    "C": lambda x: x,
    "F": np.asfortranarray,
    "reversed": lambda x: x[::-1, :, ::-1],
    "every second": lambda x: np.repeat(np.repeat(x, 2, 0), 2, 2)[::2, :, ::2],
    "broadcast": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "unaligned": lambda x: np.frombuffer(b"-" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "swapped": lambda x: x.byteswap().view(x.dtype.newbyteorder()),
    "swapped, transposed": lambda x: x.T.byteswap().view(x.dtype.newbyteorder()).T,
}


# ml_dtypes has no byte-swapped bfloat16
CASES = [(d, name) for d in DTYPES for name in LAYOUTS if d != ml_dtypes.bfloat16 or "swapped" not in name]


@pytest.mark.quick
@pytest.mark.parametrize(("dtype", "layout"), CASES, ids=lambda part: str(part))
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_layout_and_axis(dtype: np.dtype[Any], layout: str, axis: int) -> None:
    weight = LAYOUTS[layout](np.random.default_rng(3).integers(-99, 99, (12, 24, 36)).astype(dtype))
    before = weight.tobytes()
    weight.flags.writeable = False
    got = pool_heads(weight, 12, 3, axis=axis)
    np.testing.assert_array_equal(got, by_numpy(weight, 12, 3, axis % 3))
    assert got.dtype == dtype
    assert got.dtype.isnative
    assert got.flags.c_contiguous
    assert got.flags.writeable
    assert weight.tobytes() == before


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
def test_rows_of_any_length(dtype: np.dtype[Any], length: int) -> None:
    weight = np.random.default_rng(4).integers(-99, 99, (8, length)).astype(dtype)
    np.testing.assert_array_equal(pool_heads(weight, 8, 2), by_numpy(weight, 8, 2, 0))
    np.testing.assert_array_equal(pool_heads(weight.T, 8, 2, axis=1), by_numpy(weight.T, 8, 2, 1))


def test_biases_lists_and_empty_arrays(dtype: np.dtype[Any]) -> None:
    np.testing.assert_array_equal(pool_heads(np.arange(8).astype(dtype), 4, 2), np.array([1, 2, 5, 6], dtype))
    np.testing.assert_array_equal(pool_heads([1.0, 3.0], 2, 1), [2.0])
    assert pool_heads(np.empty((8, 0, 3), dtype), 4, 2).shape == (4, 0, 3)


# ---- groups and weights ----


def test_groups_partition_the_heads_in_any_order() -> None:
    weight = np.arange(6, dtype=np.float32)[:, None]
    for groups in ([[5, 0, 4], [3, 1, 2]], np.array([[5, 0, 4], [3, 1, 2]]), ((5, 0, 4), range(1, 4))):
        np.testing.assert_array_equal(pool_heads(weight, 6, 2, groups=groups), [[3], [2]])
    order = [3, 1, 2, 0, 5, 4]
    np.testing.assert_array_equal(pool_heads(weight, 6, 6, groups=[[head] for head in order])[:, 0], order)


def test_weights_are_normalised_inside_each_group(dtype: np.dtype[Any]) -> None:
    weight = np.random.default_rng(5).standard_normal((8, 40)).astype(dtype)
    weights = np.array([1, 3, 0, 4, 1e300, 2e300, 1e299, 0])
    wide = weight.astype(np.float64)
    want = np.stack([np.average(wide[:4], 0, weights[:4]), np.average(wide[4:], 0, weights[4:] / 1e300)])
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(pool_heads(weight, 8, 2, weights=weights).astype(float), want, rtol=eps, atol=eps)


def test_weights_follow_their_heads_into_groups() -> None:
    weight = np.array([1, 2, 4, 8], np.float32)
    got = pool_heads(weight, 4, 2, groups=[[3, 0], [1, 2]], weights=[1, 0, 1, 3])
    np.testing.assert_array_equal(got, [6.25, 4])


def test_equal_weights_are_the_mean_of_the_heads_that_have_one(dtype: np.dtype[Any]) -> None:
    weight = draw(np.random.default_rng(6), "normal", (8, 99), dtype)
    all_equal = pool_heads(weight, 8, 2, weights=np.full(8, 0.3))
    assert all_equal.tobytes() == pool_heads(weight, 8, 2).tobytes()
    some = pool_heads(weight, 8, 2, weights=[0.1, 0, 0.1, 0.1, 0, 7, 7, 7])
    assert some.tobytes() == pool_heads(weight[[0, 2, 3, 5, 6, 7]], 6, 2).tobytes()


def test_a_head_of_weight_zero_is_left_out_whatever_it_holds(dtype: np.dtype[Any]) -> None:
    weight = np.array([np.nan, 2, 4, np.inf, 7, np.nan], dtype)
    np.testing.assert_array_equal(pool_heads(weight, 6, 2, weights=[0, 1, 1, 0, 1, 0]), np.array([3, 7], dtype))


def test_negative_weights_extrapolate_as_in_numpy_average() -> None:
    weight = np.array([1.0, 3.0, 1.0, 3.0], np.float32)
    np.testing.assert_array_equal(pool_heads(weight, 4, 2, weights=[-1, 2, 1, -2]), [5, 5])


# ---- refusals ----

W = np.ones((8, 4), np.float32)
BAD = [
    (TypeError, r"weight has dtype int64; .*astype", {"weight": np.ones((8, 4), np.int64)}),
    (TypeError, r"weight has dtype complex64; .*real", {"weight": np.ones((8, 4), np.complex64)}),
    (TypeError, r"weight is a masked array", {"weight": np.ma.ones((8, 4))}),
    (TypeError, r"weight is None", {"weight": None}),
    (TypeError, r"weight has dtype (longdouble|float128)", {"weight": np.ones((8, 4), np.longdouble)}),
    (ValueError, r"weight has length 8 along axis 0 for num_heads 3; .*\(8, 4\)", {"num_heads": 3}),
    (ValueError, r"weight has length 4 along axis 1 for num_heads 8; .*axis=0", {"axis": 1}),
    (ValueError, r"weight has length 0", {"weight": np.ones((0, 4))}),
    (ValueError, r"axis is 2; an axis of weight \(8, 4\)", {"axis": 2}),
    (ValueError, r"axis is -3", {"axis": -3}),
    (ValueError, r"axis is 0; an axis of weight \(\)", {"weight": np.float32(1)}),
    (TypeError, r"axis is .*a float", {"axis": 0.0}),
    (TypeError, r"axis is a numpy.ndarray; an int", {"axis": np.array([0, 1])}),
    (TypeError, r"axis is np.True_", {"axis": np.True_}),
    (TypeError, r"num_heads is a numpy.ndarray; an int", {"num_heads": np.array(8.0)}),
    (
        ValueError,
        r"num_kv_heads is 3 for num_heads 1099511627776; .*1, 2, 4, 8",
        {"weight": np.broadcast_to(np.float32(1), (1 << 40,)), "num_heads": 1 << 40, "num_kv_heads": 3},
    ),
    (ValueError, r"num_heads is 0", {"num_heads": 0}),
    (TypeError, r"num_heads is True", {"num_heads": True}),
    (TypeError, r"num_kv_heads is .*a float", {"num_kv_heads": 2.0}),
    (ValueError, r"num_kv_heads is 3 for num_heads 8; .*1, 2, 4, 8", {"num_kv_heads": 3}),
    (ValueError, r"num_kv_heads is 16 for num_heads 8", {"num_kv_heads": 16}),
    (ValueError, r"num_kv_heads is -2", {"num_kv_heads": -2}),
    (ValueError, r"method is 'median'; 'mean' or 'first'", {"method": "median"}),
    (ValueError, r"method is \['mean'\]", {"method": ["mean"]}),
    (ValueError, r"weights came with method='first'", {"method": "first", "weights": np.ones(8)}),
    (ValueError, r"groups has 1 lists of lengths \[8\]; a partition .* 2 lists of 4", {"groups": [range(8)]}),
    (ValueError, r"groups has 2 lists of lengths \[3, 5\]", {"groups": [[0, 1, 2], [3, 4, 5, 6, 7]]}),
    (ValueError, r"groups lacks \[3\] and repeats \[4\]", {"groups": [[0, 1, 2, 4], [4, 5, 6, 7]]}),
    (ValueError, r"lacks \[0\] and goes beyond the last head with \[8\]", {"groups": [[8, 1, 2, 3], [4, 5, 6, 7]]}),
    (ValueError, r"a head in groups is -1; .*: pass ints from 0 to 7$", {"groups": [[-1, 1, 2, 3], [4, 5, 6, 7]]}),
    (TypeError, r"a head in groups is 0.0, .*: pass ints from 0 to 7$", {"groups": [[0.0, 1, 2, 3], [4, 5, 6, 7]]}),
    (TypeError, r"groups holds .*an int", {"groups": [0, 1]}),
    (TypeError, r"groups is .*an int", {"groups": 2}),
    (ValueError, r"weights has shape \(2,\); \(num_heads,\) = \(8,\)", {"weights": [1, 2]}),
    (ValueError, r"group of heads \[4, 5, 6, 7\] sum to 0", {"weights": [1, 1, 1, 1, 0, 0, 0, 0]}),
    (ValueError, r"group of heads \[0, 1, 2, 3\] sum to 0", {"weights": [0.1, 0.2, -0.3, 0, 1, 1, 1, 1]}),
    (ValueError, r"weights is NaN or infinite for heads \[1\]", {"weights": [1, np.nan, 1, 1, 1, 1, 1, 1]}),
    (ValueError, r"weights is NaN or infinite for heads \[7\]", {"weights": [1, 1, 1, 1, 1, 1, 1, np.inf]}),
    (TypeError, r"weights has dtype complex128", {"weights": np.ones(8, complex)}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[message[:40] for _, message, _ in BAD])
def test_a_bad_argument_is_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        pool_heads(**({"weight": W, "num_heads": 8, "num_kv_heads": 2} | arguments))
    assert re.match(r"pool_heads\(\): .+; .+: .+", str(raised.value))
