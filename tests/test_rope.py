"""RotaryEmbedding against transformers, against angles in exact arithmetic, and against an independent formula."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gqa_ext
from gqa_ext import RotaryEmbedding

Array = NDArray[Any]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
EPS = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8, np.float32: 2.0**-24, np.float64: 2.0**-51}
FAR = np.array([0, 1, 2, 100, 4095, 4096, 8191, 65_535, 131_071, 200_000])
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i for i in range(16)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {  # the dict, and max_position_embeddings
    "default": ({"rope_type": "default", "rope_theta": 500_000.0}, 2048),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0, "rope_theta": 20_000.0}, 2048),
    "yarn": (YARN, 32_768),
    "yarn, old name": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    "yarn, no truncation": (YARN | {"truncate": False, "beta_fast": 20, "beta_slow": 2}, 32_768),
    "yarn, attention_factor": (YARN | {"attention_factor": 0.7}, 32_768),
    "yarn, DeepSeek": (YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}, 32_768),
    "yarn, factor from lengths": (YARN | {"factor": None}, 40_960),
    "yarn, slow base": (YARN | {"rope_theta": 1.1}, 32_768),
    "longrope": (LONGROPE, 131_072),
    "longrope, factor": (LONGROPE | {"factor": 8.0}, 8192),
    "longrope, attention_factor": (LONGROPE | {"attention_factor": 1.3}, 8192),
    "longrope, not longer": (LONGROPE, 4096),
    "llama3": ({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500_000.0}, 131_072),
    "llama3, original from the model": (
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0}, 1024),
    "half of the head": ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, 2048),
    "an odd share": ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.35}, 2048),
    "an odd share, dynamic": ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.35}, 2048),
    "yarn, 0 for the default": (YARN | {"beta_fast": 0, "beta_slow": 0}, 32_768),
}  # fmt: skip


def turn(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """As complex numbers; cos and sin broadcast to x's rows."""
    x = x.astype(np.float64)
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    turned = (x[..., first] + 1j * x[..., second]) * (cos + 1j * sin)
    result = x.copy()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def plain(positions: Any, dim: int, base: float = 10_000.0) -> tuple[Array, Array]:
    angles = np.asarray(positions, np.float64)[..., None] * base ** (-np.arange(0, dim, 2) / dim)
    return np.cos(angles), np.sin(angles)


def inputs(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def close(ours: Array, wanted: Array, dtype: Any) -> None:
    """Rounded once: no more than an error of half a unit, beside what double arithmetic leaves."""
    assert ours.dtype == dtype
    scale = np.abs(wanted).max() if wanted.size else 0
    np.testing.assert_allclose(ours.astype(np.float64), wanted, rtol=EPS[dtype] * 1.01, atol=scale * 1e-15 + 2.0**-25)


# ---- against transformers ----


def theirs(scaling: dict[str, Any], most: int, head_dim: int = 32) -> Any:
    """transformers' module, with its arithmetic in float64 where that is a matter of the default dtype."""
    transformers = pytest.importorskip("transformers", reason="its rotary embedding is what ours is compared with")
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding  # knows partial_rotary_factor

    config = transformers.PhiConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=most,
        rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 1.0} | copy.deepcopy(scaling))  # fmt: skip
    return PhiRotaryEmbedding(config)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    """Seen in the angles at position 1 of a call whose largest position decides."""
    torch = pytest.importorskip("torch")
    scaling, most = SCALINGS[name]
    rope = RotaryEmbedding(32, scaling=scaling, max_position_embeddings=most)
    for largest in (1, 2047, 2048, 2049, 4095, 4096, 5000, 200_000):
        module = theirs(scaling, most)
        module(torch.zeros(1), torch.tensor([[1, largest]]))  # dynamic and longrope choose here
        cos, sin = rope.cos_sin(np.array([1, largest]))
        table, scale = module.inv_freq.double().numpy(), module.attention_scaling
        assert cos.shape[-1] == len(table)
        angles = np.arctan2(sin[0].astype(np.float64), cos[0].astype(np.float64))
        np.testing.assert_allclose(angles, table, rtol=2e-6, atol=0, err_msg=f"largest position {largest}")
        np.testing.assert_allclose(np.hypot(cos, sin), float(scale), rtol=1e-6)


def test_an_odd_share_comes_back_from_the_repr_and_beside_its_size() -> None:
    rope = RotaryEmbedding(16, scaling={"partial_rotary_factor": 0.35}, interleaved=True)
    again = RotaryEmbedding(16, rotary_dim=rope.rotary_dim, scaling=rope.scaling, interleaved=True)
    x = inputs(1, 3, 16)
    wanted = turn(x, *plain(np.arange(3), 5), interleaved=True)
    assert rope.rotary_dim == 6
    for each in (rope, again, eval(repr(rope)), pickle.loads(pickle.dumps(rope))):
        close(each(x), wanted, np.float64)


@pytest.mark.parametrize("name", SCALINGS)
def test_far_positions_are_those_of_transformers(name: str) -> None:
    """Within what float32 angles lose: half a unit of the frequency, and of the product, times the position."""
    torch = pytest.importorskip("torch")
    scaling, most = SCALINGS[name]
    module = theirs(scaling, most)
    cos, sin = module(torch.zeros(1), torch.tensor(FAR[None]))
    ours = RotaryEmbedding(32, scaling=scaling, max_position_embeddings=most).cos_sin(FAR)
    lost = 3e-6 + 4e-7 * FAR[:, None] * module.inv_freq.numpy()  # in radians
    for mine, other in zip(ours, (cos, sin), strict=True):
        other = other[0, :, : mine.shape[-1]].numpy()
        assert (np.abs(mine - other) <= lost * max(1.0, float(module.attention_scaling))).all()


def test_queries_and_keys_are_turned_as_transformers_does() -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    query, key = inputs(2, 4, 9, 32).astype(np.float32), inputs(2, 2, 9, 32, seed=1).astype(np.float32)
    positions = np.stack([np.arange(9), np.arange(100, 109)])
    rope = RotaryEmbedding(32, scaling=SCALINGS["llama3"][0])
    cos, sin = (torch.from_numpy(np.concatenate([half, half], -1)) for half in rope.cos_sin(positions))
    wanted = llama.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), cos, sin)
    for x, other in zip((query, key), wanted, strict=True):
        np.testing.assert_allclose(rope(x, positions), other.numpy(), rtol=1e-5, atol=1e-6)


# ---- exact angles ----


def exact_cos_sin(angle: Fraction) -> tuple[float, float]:
    """By Taylor series in rational arithmetic, after taking whole turns away."""
    digits = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706"
    turn = 2 * Fraction(digits)
    angle -= turn * round(angle / turn)
    term, sums = Fraction(1), [Fraction(0), Fraction(0)]
    for n in range(40):
        sums[n % 2] += term if n % 4 < 2 else -term
        term = (term * angle / (n + 1)).limit_denominator(10**40)
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize("position", [1, 2047, 200_000, 1_000_000, -7, 10**9])
def test_far_positions_are_right(position: int) -> None:
    """base 4 ** 8 makes every frequency of a head of 16 a power of two ** -k, known exactly."""
    rope = RotaryEmbedding(16, base=4.0**8)
    ours = np.array(rope.cos_sin([position]))[:, 0]
    wanted = np.array([exact_cos_sin(Fraction(position, 4**i)) for i in range(8)]).T
    np.testing.assert_allclose(ours, wanted, rtol=2.0**-24, atol=1e-12 + abs(position) * 1e-16)


def test_float64_keeps_its_precision_at_a_million() -> None:
    rope = RotaryEmbedding(16, base=4.0**8)
    x = inputs(1, 1, 16)
    cos, sin = np.array([exact_cos_sin(Fraction(1_000_000, 4**i)) for i in range(8)]).T
    np.testing.assert_allclose(rope(x, [1_000_000]), turn(x, cos, sin), rtol=0, atol=1e-14)


# ---- layouts, dtypes, threads ----


@pytest.mark.quick
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [2, 10, 24])
def test_turning(interleaved: bool, dtype: Any, rotary_dim: int) -> None:
    x = inputs(2, 3, 37, 24).astype(dtype)
    positions = np.random.default_rng(1).integers(0, 5000, (2, 37))
    out = RotaryEmbedding(24, rotary_dim=rotary_dim, interleaved=interleaved)(x, positions)
    close(out, turn(x, *plain(positions[:, None], rotary_dim), interleaved), dtype)
    np.testing.assert_array_equal(out[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (4, 2, 3, 5, 8), (0, 3, 5, 8), (2, 3, 0, 8)])
def test_positions_default_to_the_first_ones(shape: tuple[int, ...]) -> None:
    x, rope = inputs(*shape), RotaryEmbedding(8)
    first = np.arange(shape[-2])
    close(rope(x), turn(x, *plain(first, 8)), np.float64)
    np.testing.assert_array_equal(rope(x, first), rope(x))


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (1, 1, 5), (2, 1, 5), (1, 3, 5), (2, 3, 5)])
@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", ">i8", "strided", "list"])
def test_positions_broadcast_to_what_stands_before_the_heads(shape: tuple[int, ...], kind: str) -> None:
    x = inputs(2, 3, 4, 5, 8)
    numbers = np.random.default_rng(2).integers(0, 200, shape)
    positions: Any = numbers.tolist() if kind == "list" else numbers
    if kind == "strided":
        positions = np.repeat(numbers, 3, axis=-1)[..., ::3]
    elif kind != "list":
        positions = numbers.astype(kind)
    wanted = turn(x, *plain(np.broadcast_to(numbers, (2, 3, 5))[:, :, None], 8))
    close(RotaryEmbedding(8)(x, positions), wanted, np.float64)


def layouts(x: Array) -> dict[str, Array]:
    """The same numbers, lying differently."""
    swapped = np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    apart = np.zeros((*x.shape[:-1], 3 * x.shape[-1]), x.dtype)[..., ::3]
    apart[...] = x
    backwards = x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    unaligned = raw.view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    fixed = x.copy()
    fixed.flags.writeable = False
    found = {"heads last": swapped, "apart": apart, "backwards": backwards, "unaligned": unaligned, "read-only": fixed}
    if x.dtype != ml_dtypes.bfloat16:
        found["swapped bytes"] = x.astype(x.dtype.newbyteorder())
    return found


@pytest.mark.quick
@pytest.mark.parametrize("rotary_dim", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(dtype: Any, rotary_dim: int) -> None:
    x = inputs(2, 3, 19, 8).astype(dtype)
    rope = RotaryEmbedding(8, rotary_dim=rotary_dim)
    wanted = rope(x)
    for name, same in layouts(x).items():
        before = same.tobytes()
        out = rope(same)
        assert out.dtype == dtype, name
        assert out.flags.c_contiguous, name
        assert out.tobytes() == wanted.tobytes(), name
        assert same.tobytes() == before, name
        if not same.flags.writeable:
            continue
        target = np.empty_like(same)
        assert rope(x, out=target) is target
        assert np.ascontiguousarray(target, dtype).tobytes() == wanted.tobytes(), name
        assert rope(same, out=same) is same
        assert np.ascontiguousarray(same, dtype).tobytes() == wanted.tobytes(), name


def test_a_broadcast_row_is_read_in_place() -> None:
    x = np.broadcast_to(inputs(1, 1, 1, 8), (2, 3, 5, 8))
    close(RotaryEmbedding(8)(x), turn(x, *plain(np.arange(5), 8)), np.float64)


def test_other_overlaps_go_through_a_temporary() -> None:
    rope = RotaryEmbedding(8)
    memory = inputs(4, 20, 8)
    wanted = rope(memory[:, :19])
    assert np.array_equal(rope(memory[:, :19], out=memory[:, 1:]), wanted)
    memory = inputs(4, 20, 8)
    wanted = rope(memory)
    assert np.array_equal(rope(memory, out=memory[:, :, ::-1])[:, :, :], wanted)
    shared = np.zeros((1, 2, 8))
    positions = shared.view(np.int64)[0, 0, :2]
    positions[...] = 3, 4
    wanted = rope(np.ones((1, 2, 8)), np.array([3, 4]))
    assert np.array_equal(rope(np.ones((1, 2, 8)), positions, out=shared), wanted)


def test_threads_change_no_bit() -> None:
    rope, x = RotaryEmbedding(16), inputs(2, 600, 150, 16).astype(np.float32)
    positions = np.random.default_rng(3).integers(0, 10**6, (2, 150))
    before, found = gqa_ext.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            gqa_ext.set_num_threads(count)
            found.append(rope(x, positions))
    finally:
        gqa_ext.set_num_threads(before)
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    alone = rope(x[1:, 522:523, 149:], positions[1:, 149:])
    assert alone.tobytes() == found[0][1:, 522:523, 149:].tobytes()
    np.testing.assert_allclose(found[0], turn(x, *plain(positions[:, None], 16)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_ctrl_c_ends_a_call_of_hours(count: int) -> None:
    """All rows are read from and written to one place, which only _core allows."""
    script = f"""
import os, signal, threading
import numpy as np
import gqa_ext
from gqa_ext import _core

gqa_ext.set_num_threads({count})
signal.signal(signal.SIGINT, signal.default_int_handler)
place = np.lib.stride_tricks.as_strided(np.ones(8), (1 << 30, 1 << 10, 8), (0, 0, 8))
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    _core.rope(place, None, np.ones((1, 4)), 1.0, False, place)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "interrupted\n", done.stderr


def test_not_a_number_stays_in_its_pair() -> None:
    x = np.ones((1, 3, 8), np.float32)
    x[0, 1, 2] = np.nan
    bad = np.isnan(RotaryEmbedding(8)(x))
    assert np.argwhere(bad).tolist() == [[0, 1, 2], [0, 1, 6]]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 3)])
def test_cos_sin_has_the_shape_of_positions(shape: tuple[int, ...]) -> None:
    positions = np.random.default_rng(4).integers(0, 99, shape)
    for ours, wanted in zip(RotaryEmbedding(16, rotary_dim=8).cos_sin(positions), plain(positions, 8), strict=True):
        assert ours.flags.c_contiguous
        close(ours, wanted, np.float32)


# ---- the choice of each call ----


def test_a_call_chooses_by_its_largest_position_and_forgets() -> None:
    rope = RotaryEmbedding(8, scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=10)
    x = inputs(2, 1, 4, 8)
    short = rope(x, [6, 7, 8, 9])
    close(short, turn(x, *plain([6, 7, 8, 9], 8)), np.float64)
    base = 10_000 * (2 * 21 / 10 - 1) ** (8 / 6)
    positions = np.array([[0, 1, 2, 3], [17, 20, 19, 18]])
    close(rope(x, positions), turn(x, *plain(positions[:, None], 8, base)), np.float64)
    np.testing.assert_array_equal(rope(x, [6, 7, 8, 9]), short)
    longer = inputs(1, 12, 8)
    close(rope(longer), turn(longer, *plain(np.arange(12), 8, 10_000 * (2 * 12 / 10 - 1) ** (8 / 6))), np.float64)


# ---- construction ----


@pytest.mark.parametrize("options", [
    {}, {"base": 5e5}, {"rotary_dim": 8, "interleaved": True}, {"scaling": {}, "max_position_embeddings": 64},
    {"scaling": SCALINGS["longrope"][0] | {"partial_rotary_factor": 1.0}, "max_position_embeddings": 131_072},
])  # fmt: skip
def test_repr_and_copies_build_the_same(options: dict[str, Any]) -> None:
    rope, x = RotaryEmbedding(32, **options), inputs(2, 3, 32)
    for same in (eval(repr(rope)), copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert repr(same) == repr(rope)
        np.testing.assert_array_equal(same(x), rope(x))


def test_repr_is_short() -> None:
    assert repr(RotaryEmbedding(64)) == "RotaryEmbedding(64)"
    assert (
        repr(RotaryEmbedding(64, base=5e5, interleaved=True)) == "RotaryEmbedding(64, base=500000.0, interleaved=True)"
    )


def test_what_is_said_twice_alike_is_taken() -> None:
    scaling = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "factor": 4,
               "original_max_position_embeddings": 64, "attention_factor": None}  # fmt: skip
    before = copy.deepcopy(scaling)
    rope = RotaryEmbedding(16, base=1_000_000, rotary_dim=8, scaling=scaling, max_position_embeddings=256)
    assert (rope.head_dim, rope.rotary_dim, rope.base, rope.interleaved) == (16, 8, 1e6, False)
    assert rope.scaling == scaling == before
