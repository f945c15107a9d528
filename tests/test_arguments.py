"""What the calls take, in which order, and what they give back; their documentation's examples."""

from __future__ import annotations

import doctest
import inspect
import re
import warnings
from typing import Any

import numpy as np
import pytest

import gqa_ext
from gqa_ext import (
    _runtime,
    attention,
    bias,
    cache,
    kv_cache_nbytes,
    merge,
    module,
    paged,
    repeat_kv,
    rope,
    scaled_dot_product_attention,
    testing,
)

RNG = np.random.default_rng(5)
QUERY = RNG.normal(size=(2, 8, 5, 16)).astype(np.float32)
KEY = RNG.normal(size=(2, 2, 5, 16)).astype(np.float32)
VALUE = RNG.normal(size=(2, 2, 5, 9)).astype(np.float32)


def attend(**changes: Any) -> Any:
    return scaled_dot_product_attention(**{"query": QUERY, "key": KEY, "value": VALUE, **changes})


def test_signature_is_the_contract() -> None:
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert positional == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert {"causal_alignment", "window", "softcap", "alibi_slopes", "sinks", "query_lengths", "kv_lengths"} < set(
        by_name
    )
    assert {"query_positions", "key_positions", "return_lse", "return_weights", "rng", "out"} < set(by_name)
    assert len(by_name) == 13
    assert parameters["enable_gqa"].default is True


def test_positional_order_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    mask = RNG.normal(size=(5, 5)).astype(np.float32)
    ours = scaled_dot_product_attention(QUERY, KEY, VALUE, mask, 0.0, False, 0.3, True)
    tensors = [torch.from_numpy(array) for array in (QUERY, KEY, VALUE, mask)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, 0.0, False, scale=0.3, enable_gqa=True)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads", [(8, 8, 8), (8, 1, 1), (1, 8, 8), (8, 1, 8), (1, 1, 8), (8, 8, 1), (8, 2, 2), (2, 8, 8)]
)
def test_enable_gqa_false_broadcasts_heads_as_torch_does(heads: tuple[int, int, int]) -> None:
    torch = pytest.importorskip("torch")
    arrays = [RNG.normal(size=(2, n, 5, 16)).astype(np.float32) for n in heads]
    try:
        theirs = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, arrays)).numpy()
    except RuntimeError:
        with pytest.raises(ValueError, match=r"enable_gqa=True|equal heads"):
            scaled_dot_product_attention(*arrays, enable_gqa=False)
        return
    ours = scaled_dot_product_attention(*arrays, enable_gqa=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_results() -> None:
    out = attend()
    assert isinstance(out, np.ndarray)
    pair = attend(return_lse=True)
    assert type(pair) is tuple
    assert pair[0].shape == (2, 8, 5, 9)
    assert pair[1].shape == (2, 8, 5)
    assert pair[1].dtype == np.float32
    assert attend(query=QUERY[0, 0], key=KEY[0, 0], value=VALUE[0, 0], return_lse=True)[1].shape == (5,)


@pytest.mark.parametrize("flag", [True, np.True_])
def test_numpy_bools_are_bools(flag: Any) -> None:
    np.testing.assert_array_equal(attend(is_causal=flag), attend(is_causal=True))


LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@pytest.mark.parametrize("scale", [LARGEST, -LARGEST, SMALLEST])
def test_the_scales_that_float32_just_holds(scale: float) -> None:
    """Queries of the other size make scores of about 1."""
    other = np.float32(1 / scale)
    np.testing.assert_allclose(attend(query=QUERY * other, scale=scale), attend(scale=1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e40, -1e300, 1e-40])
def test_float64_holds_scales_that_float32_does_not(scale: float) -> None:
    """Beside float32 they were clamped: finite and wrong."""
    query, key, value = np.array([[1 / scale]]), np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    arrays = {"query": query, "key": key, "value": value}
    np.testing.assert_allclose(attend(**arrays, scale=scale), 1 / (1 + np.exp(-1.0)))
    with pytest.raises(ValueError, match="pass float64 arrays"):
        attend(scale=scale)


@pytest.mark.parametrize("scale", [1, np.float32(1), np.int8(1), np.array(1.0)])
def test_real_numbers_are_scales(scale: Any) -> None:
    np.testing.assert_array_equal(attend(scale=scale), attend(scale=1.0))


def test_out_is_returned_itself() -> None:
    out = np.empty((2, 8, 5, 9), np.float32)
    assert attend(out=out) is out
    again, lse = attend(out=out, return_lse=True)
    assert again is out
    np.testing.assert_array_equal(lse, attend(return_lse=True)[1])


def test_out_of_a_subclass_is_returned_itself(tmp_path: Any) -> None:
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(2, 8, 5, 9))
    assert attend(out=out) is out
    np.testing.assert_array_equal(out, attend())


def test_subclasses_are_plain_arrays_here() -> None:
    class Tagged(np.ndarray):
        pass

    assert type(attend(query=QUERY.view(Tagged), value=VALUE.view(Tagged))) is np.ndarray


def test_torch_tensors_are_array_likes() -> None:
    torch = pytest.importorskip("torch")
    tensors = {"query": torch.from_numpy(QUERY), "key": torch.from_numpy(KEY), "value": torch.from_numpy(VALUE)}
    np.testing.assert_array_equal(attend(**tensors), attend())
    with pytest.raises(TypeError, match=r"query is a torch\.Tensor that NumPy cannot read .*query\.detach\(\)"):
        attend(query=torch.from_numpy(QUERY).requires_grad_())
    with pytest.raises(TypeError, match=r"key is a torch\.Tensor that NumPy cannot read .*\.float\(\)"):
        attend(key=torch.from_numpy(KEY).bfloat16())


# ---- the rules ----


@pytest.mark.parametrize("window", [[2, 1], (np.int8(2), np.uint64(1)), np.array([2, 1])])
def test_windows_of_any_integers(window: Any) -> None:
    np.testing.assert_array_equal(attend(window=window), attend(window=(2, 1)))
    assert (attend(window=window) != attend()).any()


def test_an_open_window_is_none() -> None:
    for window in ((None, None), (10**30, None), np.array([9, 9])):
        np.testing.assert_allclose(attend(window=window), attend(), rtol=1e-6)
    np.testing.assert_array_equal(attend(window=(10**30, 0)), attend(window=(None, 0)))


@pytest.mark.parametrize("softcap", [2, np.float16(2), np.int64(2), np.array(2.0)])
def test_real_numbers_are_softcaps(softcap: Any) -> None:
    np.testing.assert_array_equal(attend(softcap=softcap), attend(softcap=2.0))


@pytest.mark.parametrize("softcap", [1e39, 1e-46])
def test_float64_holds_softcaps_that_float32_does_not(softcap: float) -> None:
    """Beside float32 the one gave NaN, and the other was 0, which is off."""
    arrays = {"query": QUERY.astype(float), "key": KEY.astype(float), "value": VALUE.astype(float)}
    wanted = attend(**arrays, scale=None if softcap > 1 else 0.0)
    np.testing.assert_allclose(attend(**arrays, softcap=softcap), wanted, rtol=1e-12)


NUMBERS = [np.int8, np.uint32, np.float16, "bfloat16", ">f4", ">f8", np.float64]


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_sinks_and_slopes_of_any_real_dtype(name: str, dtype: Any) -> None:
    numbers = np.arange(8)
    wanted = attend(**{name: numbers.astype(np.float32)})
    np.testing.assert_array_equal(attend(**{name: numbers.astype(dtype)}), wanted)
    np.testing.assert_array_equal(attend(**{name: numbers.tolist()}), wanted)


def test_lengths_are_ints_lists_or_arrays_without_a_batch_too() -> None:
    wanted = attend(kv_lengths=np.array([3, 3]))
    for lengths in (3, np.int8(3), np.array(3), [3], (3, 3), np.broadcast_to(np.uint64(3), 2)):
        np.testing.assert_array_equal(attend(kv_lengths=lengths), wanted)
    one = {"query": QUERY[0, 0], "key": KEY[0, 0], "value": VALUE[0, 0], "kv_lengths": 3}
    np.testing.assert_allclose(attend(**one), wanted[0, 0], rtol=1e-5, atol=1e-6)
    assert attend(query=QUERY[:0], key=KEY[:0], value=VALUE[:0], kv_lengths=[]).shape == (0, 8, 5, 9)


def test_lengths_broadcast_over_several_leading_dimensions() -> None:
    query, key, value = (np.stack([array] * 3) for array in (QUERY, KEY, VALUE))
    for lengths in ([2, 4], [[1], [2], [3]], [[1, 2], [3, 4], [5, 0]]):
        out = attend(query=query, key=key, value=value, kv_lengths=lengths)
        for i, j in np.ndindex(3, 2):
            part = {"query": QUERY[j], "key": KEY[j], "value": VALUE[j]}
            length = int(np.broadcast_to(lengths, (3, 2))[i, j])
            np.testing.assert_allclose(out[i, j], attend(**part, kv_lengths=length), rtol=1e-5, atol=1e-6)


def test_rules_go_with_heads_that_broadcast() -> None:
    """enable_gqa=False lets one query head meet many key heads: a sink for each of those."""
    arrays = {"query": QUERY[:, :1], "key": np.repeat(KEY, 4, 1), "value": np.repeat(VALUE, 4, 1)}
    wide = {**arrays, "query": np.repeat(QUERY[:, :1], 8, 1)}
    rules = {"sinks": np.arange(8.0), "alibi_slopes": np.arange(8.0)}
    np.testing.assert_array_equal(attend(**arrays, **rules, enable_gqa=False), attend(**wide, **rules))
    with pytest.raises(ValueError, match=r"sinks has shape \(1,\); one logit for each query head, \(8,\)"):
        attend(**arrays, sinks=[0.0], enable_gqa=False)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_out_may_lie_over_a_rule(name: str) -> None:
    numbers = np.arange(8, dtype=np.float32)
    wanted = attend(**{name: numbers})
    out = np.empty((2, 8, 5, 9), np.float32)
    out.reshape(-1)[:8] = numbers
    np.testing.assert_array_equal(attend(**{name: out.reshape(-1)[:8]}, out=out), wanted)


def test_torch_tensors_are_rules() -> None:
    torch = pytest.importorskip("torch")
    rules = {"kv_lengths": [3, 5], "sinks": [0.5] * 8, "key_positions": list(range(5)), "window": (2, 2)}
    tensors = {name: rule if name == "window" else torch.tensor(rule) for name, rule in rules.items()}
    np.testing.assert_array_equal(attend(**tensors), attend(**rules))


# ---- the warning ----


def causal_call(rows: int, **changes: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attend(query=QUERY[:, :, :rows], is_causal=True, **changes)
    return caught


def test_causal_between_unequal_lengths_warns_the_caller() -> None:
    (warning,) = causal_call(3)
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert "3 query rows and 5 key rows" in str(warning.message)
    assert "causal_alignment='lower_right'" in str(warning.message)


def test_causal_is_silent_where_the_meaning_is_clear() -> None:
    assert not causal_call(5)
    assert not causal_call(3, causal_alignment="lower_right")
    assert not causal_call(3, causal_alignment="upper_left")


def test_an_alignment_alone_changes_nothing() -> None:
    np.testing.assert_array_equal(attend(causal_alignment="lower_right"), attend())


# ---- the helpers ----


@pytest.mark.parametrize("axis", [-3, 1, 0, -1])
def test_repeat_kv_is_repeat_interleave(axis: int) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.repeat_interleave(torch.from_numpy(KEY), 3, dim=axis).numpy()
    np.testing.assert_array_equal(repeat_kv(KEY, 3, axis=axis), expected)


@pytest.mark.parametrize("n_rep", [1, 4])
def test_repeat_kv_makes_equal_heads_for_grouped_ones(n_rep: int) -> None:
    key, value = repeat_kv(KEY, n_rep), repeat_kv(VALUE, n_rep)
    assert not np.shares_memory(key, KEY)
    np.testing.assert_allclose(attend(key=key, value=value), attend(), rtol=1e-5, atol=1e-6)


def test_repeat_kv_gives_native_contiguous_arrays_of_any_dtype() -> None:
    out = repeat_kv(KEY.astype(">i4")[:, :, ::-1], 2)
    assert out.dtype == np.int32
    assert out.dtype.isnative
    assert out.flags.c_contiguous


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 4096, 8, 128), {}, 2 * 4096 * 8 * 128 * 2),
        ((2, 10, 3, 5), {"num_layers": 7, "dtype": np.float32}, 2 * 7 * 2 * 10 * 3 * 5 * 4),
        ((1, 1, 1, 1), {"dtype": "bfloat16"}, 4),
        ((1, 1, 1, 1), {"dtype": "int8"}, 2),
        ((0, 4096, 8, 128), {}, 0),
        ((2**20, 2**20, 2**10, 2**10), {"num_layers": np.int32(100)}, 400 * 2**60),
    ],
)
def test_kv_cache_nbytes(args: tuple[int, ...], kwargs: dict[str, Any], expected: int) -> None:
    assert kv_cache_nbytes(*args, **kwargs) == expected


def test_set_num_threads_is_read_back() -> None:
    before = gqa_ext.get_num_threads()
    try:
        gqa_ext.set_num_threads(np.int64(3))
        assert gqa_ext.get_num_threads() == 3
    finally:
        gqa_ext.set_num_threads(before)


MODULES = [gqa_ext, attention, bias, cache, merge, module, paged, rope, testing, _runtime]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples_run(module: Any) -> None:
    before = gqa_ext.get_num_threads()
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    gqa_ext.set_num_threads(before)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", gqa_ext.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(gqa_ext, name)) or ""
    assert len(text) > 40
    assert not re.search(r"^ *\{\w+\}$", text, re.MULTILINE)  # a paragraph that nobody filled in
