"""float16 and bfloat16: read exactly, summed in float32, rounded once to nearest even, wherever they lie.

So a call on halves is the same call on the float32 numbers they stand for, rounded at the end as
NumPy rounds; only the order of the float32 sums may be another.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rules
from numpy.typing import NDArray
from reference import Problem
from rules import Mix, agree, attend, dtype_of

import gqa_ext

Array = NDArray[Any]
HALVES = ("float16", "bfloat16")
SINGLES = (*HALVES, "float32")
SIZES = [(1, 700), (3, 140), (20, 300), (64, 150)]


def single(x: Array) -> Array:
    return x.astype(np.float32)


def same(got: tuple[Array, ...], wanted: tuple[Array, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), f"{(a != b).sum()} of {a.size} differ"


@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
@pytest.mark.parametrize("dtypes", list(itertools.product(SINGLES, repeat=3)), ids="-".join)
def test_any_mix(dtypes: tuple[str, str, str], seq_q: int, seq_k: int, isa: str) -> None:
    """The output has query's dtype; the LSE is float32."""
    plain = rules.problem(Mix(("softcap", "sinks"), seq_q=seq_q, seq_k=seq_k, batch=1, num_kv_heads=1))
    arrays = (x.astype(dtype_of(d)) for x, d in zip((plain.query, plain.key, plain.value), dtypes, strict=True))
    query, key, value = arrays
    out, lse = attend(replace(plain, query=query, key=key, value=value))
    assert lse.dtype == np.float32
    exact, exact_lse = attend(replace(plain, query=single(query), key=single(key), value=single(value)))
    slack = 4e-7 * np.abs(exact).max() + 1e-7  # the float32 sums', before rounding
    assert (single((exact - slack).astype(query.dtype)) <= single(out)).all()
    assert (single(out) <= single((exact + slack).astype(query.dtype))).all()
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6)
    if seq_k <= 150:
        agree(replace(plain, query=query, key=key, value=value), isa, "-".join(dtypes))


def patterns(dtype: str) -> Array:
    """Every number that a half can be, NaNs and infinities included."""
    return np.arange(2**16, dtype=np.uint16).view(dtype_of(dtype))


def one_key(value: Array, query_dtype: str, rows: int) -> Array:
    """Attention to a single key, whose weight is exactly 1: the value itself in query's dtype. (rows, Dv)"""
    query = np.zeros((1, rows, 4), dtype_of(query_dtype))
    out = gqa_ext.scaled_dot_product_attention(query, np.zeros((1, 1, 4), np.float32), value[None, None])
    return np.asarray(out[0])


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("query_dtype", SINGLES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_there_is(dtype: str, query_dtype: str, rows: int, isa: str) -> None:
    """Read exactly, denormals too, and rounded as NumPy rounds where the other half cannot hold it."""
    value = patterns(dtype)
    with np.errstate(all="ignore"):
        wanted = single(value).astype(dtype_of(query_dtype))
    out = one_key(value, query_dtype, rows)
    np.testing.assert_array_equal(single(out), np.tile(single(wanted), (rows, 1)))


def near_ties(dtype: str) -> Array:
    """Float32 numbers at, just above and just below the middle between two halves, over all their range."""
    half = patterns(dtype)
    with np.errstate(all="ignore"):
        low = np.sort(single(half[np.isfinite(single(half))]).astype(np.float64))
    middle = ((low[1:] + low[:-1]) / 2).astype(np.float32)
    ends = np.array([65519, 65520, 65535.9, 3.3895e38, 3.4e38], np.float32)
    every = np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, -np.float32(1e38))])
    return np.concatenate([every, ends, -ends])


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_nearest_even(dtype: str, rows: int, isa: str) -> None:
    """Every tie and its neighbours, overflow to infinity included."""
    value = near_ties(dtype)
    with np.errstate(over="ignore"):
        wanted = value.astype(dtype_of(dtype))
    np.testing.assert_array_equal(single(one_key(value, dtype, rows)), np.tile(single(wanted), (rows, 1)))


@pytest.mark.parametrize("seq_q", [1, 50])
@pytest.mark.parametrize("dtype", HALVES)
def test_value_one_gives_one(dtype: str, seq_q: int, isa: str) -> None:
    """8k keys and 64k: sums in halves would stop long before (at 2048 in float16, at 256 in bfloat16)."""
    rng = np.random.default_rng(0)
    for seq_k in (8192, 65_536):
        query = rng.standard_normal((1, seq_q, 8)).astype(dtype_of(dtype))
        key = rng.standard_normal((1, seq_k, 8)).astype(dtype_of(dtype))
        out = gqa_ext.scaled_dot_product_attention(query, key, np.ones((1, seq_k, 5), dtype_of(dtype)))
        assert (single(out) == 1).all()


def layouts(x: Array) -> dict[str, Array]:
    """The same numbers, lying in other ways; none is as NumPy would lay it."""
    swapped = x.astype(x.dtype.newbyteorder()) if x.dtype.kind == "f" else x
    spaced = np.repeat(np.repeat(x, 2, axis=-1), 3, axis=-2)[..., ::3, ::2]
    raw = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    return {
        "swapped": swapped,
        "spaced": spaced,
        "unaligned": unaligned,
        "backwards": np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
        "transposed": np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
        "heads last": np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2),
        "swapped and spaced": np.repeat(swapped, 2, axis=-1)[..., ::2],
    }


@pytest.mark.parametrize(("seq_q", "seq_k"), [*SIZES, (1, 2000)])
@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(dtype: str, seq_q: int, seq_k: int, isa: str) -> None:
    """Strided, negative, unaligned, byte-swapped: the same bits."""
    plain = rules.problem(Mix(("sinks",), dtype, seq_q=seq_q, seq_k=seq_k))
    wanted = attend(plain)
    for name in layouts(plain.key):
        arrays = (layouts(x)[name] for x in (plain.query, plain.key, plain.value))
        query, key, value = arrays
        out, lse = attend(replace(plain, query=query, key=key, value=value))
        assert out.dtype == plain.query.dtype, name
        assert out.tobytes() == wanted[0].tobytes(), name
        assert lse.tobytes() == wanted[1].tobytes(), name


@pytest.mark.parametrize("seq_q", [1, 3, 64])
@pytest.mark.parametrize("dtype", HALVES)
def test_out(dtype: str, seq_q: int, isa: str) -> None:
    """Written in place, however it lies, query itself included."""
    plain = rules.problem(Mix((), dtype, seq_q=seq_q, head_dim=17))
    wanted, _ = attend(plain)
    for name, target in layouts(np.zeros_like(wanted)).items():
        if "swapped" in name or not target.flags.writeable:
            continue
        out, _ = attend(plain, out=target)
        assert out is target
        assert np.ascontiguousarray(out).tobytes() == wanted.tobytes(), name
    query = plain.query.copy()
    out, _ = attend(replace(plain, query=query), out=query)
    assert out is query
    assert out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", HALVES)
def test_zero_strides(dtype: str, isa: str) -> None:
    """One row of keys for all heads and positions, as np.broadcast_to makes it."""
    plain = rules.problem(Mix((), dtype, seq_q=5))
    key, value = (np.broadcast_to(x[:1, :1, :1], x.shape) for x in (plain.key, plain.value))
    shared = attend(replace(plain, key=key, value=value))
    same(shared, attend(replace(plain, key=key.copy(), value=value.copy())))


def test_extreme_scores(isa: str) -> None:
    """Products of float16's largest numbers overflow float16 and not float32."""
    rng = np.random.default_rng(0)
    query, key, value = (np.sign(rng.standard_normal((1, n, 8))).astype(np.float16) for n in (3, 40, 40))
    agree(Problem(query * np.float16(60000), key * np.float16(60000), value), isa)
    agree(Problem(query, key, value * np.float16(65504)), isa)
    agree(Problem(query, key, value * np.float16(6e-8)), isa)


@pytest.mark.parametrize("dtype", HALVES)
def test_no_half_beside_double(dtype: str) -> None:
    half, double = np.ones((1, 2, 4), dtype_of(dtype)), np.ones((1, 2, 4))
    for given in ((half, double, double), (double, half, double), (double, double, half), (half, half, double)):
        with pytest.raises(TypeError, match="float64"):
            gqa_ext.scaled_dot_product_attention(*given)
