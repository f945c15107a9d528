"""The layer against torch and against itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch

import gqa_ext
from gqa_ext import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def build(*sizes: int, rng: int = 0, **options: Any) -> GroupedQueryAttention:
    """A layer whose biases are not 0."""
    layer = GroupedQueryAttention(*sizes, rng=rng, **options)
    for name, array in layer.named_parameters():
        if name.endswith("bias"):
            array[...] = inputs(*array.shape, seed=len(name) + ord(name[0]))
    return layer


def by_reference(layer: GroupedQueryAttention, query: Any, key: Any = None, value: Any = None, **rules: Any) -> Any:
    """The layer in float64: out and weights."""
    key = query if key is None else key
    value = key if value is None else value

    def project(linear: Any, x: np.ndarray) -> np.ndarray:
        y = x.astype(np.float64) @ linear.weight.T.astype(np.float64)
        return y if linear.bias is None else y + linear.bias

    def split(x: np.ndarray, heads: int) -> np.ndarray:
        return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)

    q = split(project(layer.q_proj, query), layer.num_heads)
    k = split(project(layer.k_proj, key), layer.num_kv_heads)
    v = split(project(layer.v_proj, value), layer.num_kv_heads)
    attention = reference.attention(q, k, v, scale=layer.scale, **rules)
    out = project(layer.o_proj, attention.out.swapaxes(-2, -3).reshape(*query.shape[:-1], -1))
    return out, attention.weights


# ---- construction ----


def test_parameters_are_counted() -> None:
    assert GroupedQueryAttention(128, 8, 2).num_parameters() == 40960
    assert MultiHeadAttention(128, 8, bias=True).num_parameters() == 66048
    theirs = torch.nn.MultiheadAttention(128, 8)
    assert sum(p.numel() for p in theirs.parameters()) == 66048
    assert MultiQueryAttention(128, 8).num_parameters() == 2 * 128 * 128 + 2 * 128 * 16
    layer = GroupedQueryAttention(10, 6, 3, head_dim=4, v_head_dim=5, kv_embed_dim=7, bias=True, out_bias=False)
    shapes = {name: array.shape for name, array in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (24, 10), "q_proj.bias": (24,), "k_proj.weight": (12, 7), "k_proj.bias": (12,),
        "v_proj.weight": (15, 7), "v_proj.bias": (15,), "o_proj.weight": (10, 30),
    }  # fmt: skip
    assert [array.shape for array in layer.parameters()] == list(shapes.values())
    assert layer.num_parameters() == sum(np.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"out_bias": True}, {"bias": True, "out_bias": False}])
def test_out_bias_follows_bias(options: dict[str, bool]) -> None:
    layer = GroupedQueryAttention(8, 2, 1, **options)
    bias = options.get("bias", False)
    assert [p.bias is not None for p in (layer.q_proj, layer.k_proj, layer.v_proj)] == [bias] * 3
    assert (layer.o_proj.bias is not None) == options.get("out_bias", bias)


@pytest.mark.parametrize(
    "text",
    [
        "GroupedQueryAttention(128, 8, 2)",
        "GroupedQueryAttention(128, 8, 2, head_dim=32, v_head_dim=8, kv_embed_dim=64, bias=True, out_bias=False)",
        "GroupedQueryAttention(10, 4, 2, head_dim=4, out_bias=True, scale=0.25, dtype='float64')",
        "MultiHeadAttention(128, 8, bias=True)",
        "MultiQueryAttention(128, 8, dtype='float64')",
    ],
)
def test_repr_is_the_call(text: str) -> None:
    layer = eval(text, vars(gqa_ext))
    assert repr(layer) == text
    assert type(layer) is type(eval(repr(layer), vars(gqa_ext)))
    same = eval(repr(layer), vars(gqa_ext))
    assert {n: (a.shape, a.dtype) for n, a in same.named_parameters()} == {
        n: (a.shape, a.dtype) for n, a in layer.named_parameters()
    }


def test_a_subclass_is_named_in_repr_and_in_messages() -> None:
    class Mine(MultiHeadAttention):
        pass

    assert repr(Mine(8, 2)) == "Mine(8, 2)"
    with pytest.raises(ValueError, match=r"Mine\.__call__\(\): query has 9 features"):
        Mine(8, 2)(inputs(3, 9))


def test_seeds_repeat() -> None:
    def weights(rng: Any, **options: Any) -> np.ndarray:
        return np.concatenate([a.ravel() for a in GroupedQueryAttention(16, 4, 2, rng=rng, **options).parameters()])

    np.testing.assert_array_equal(weights(7), weights(7))
    np.testing.assert_array_equal(weights(np.random.default_rng(7)), weights(7))
    np.testing.assert_array_equal(weights(7), weights(7, dtype="float64").astype(np.float32))
    assert (weights(7) != weights(8)).any()
    assert (weights(None) != weights(None)).any()
    assert np.abs(weights(7)).max() <= np.sqrt(6 / (16 + 8))


def test_modes() -> None:
    layer = GroupedQueryAttention(8, 2, 1)
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train(False).training is False


def test_copies_and_pickles_are_apart() -> None:
    layer, x = build(16, 4, 2, bias=True), inputs(2, 5, 16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other(x), layer(x))
        other.q_proj.weight[...] = 0
        assert layer.q_proj.weight.any()


# ---- the call ----


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_float64(dtype: str, kv_heads: int, bias: bool) -> None:
    layer = build(32, 8, kv_heads, bias=bias, dtype=dtype)
    x = inputs(3, 11, 32, dtype=dtype)
    out = layer(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    np.testing.assert_allclose(out, by_reference(layer, x)[0], **TOLERANCE)
    np.testing.assert_allclose(layer(x[1]), out[1], **TOLERANCE)
    np.testing.assert_allclose(layer(x, is_causal=True), by_reference(layer, x, is_causal=True)[0], **TOLERANCE)


def test_three_inputs_of_their_own() -> None:
    layer = build(20, 6, 3, head_dim=5, v_head_dim=7, kv_embed_dim=12, bias=True, scale=0.3)
    query, key, value = inputs(2, 4, 20), inputs(2, 9, 12, seed=1), inputs(2, 9, 12, seed=2)
    np.testing.assert_allclose(layer(query, key, value), by_reference(layer, query, key, value)[0], **TOLERANCE)
    np.testing.assert_array_equal(layer(query, key), layer(query, key, key))
    same = build(20, 4, 2)
    np.testing.assert_array_equal(same(query), same(query, query, query))
    np.testing.assert_array_equal(same(query, value=query), same(query))
    shared = layer(query, key[:1], value[:1])
    np.testing.assert_allclose(shared[1], layer(query[1], key[0], value[0]), **TOLERANCE)


MASKS = [
    np.tri(5, 7, 1, dtype=bool),
    np.random.default_rng(0).random((8, 5, 7)) < 0.6,
    np.random.default_rng(1).random((3, 1, 1, 7)) < 0.6,
    np.random.default_rng(2).standard_normal((3, 8, 5, 7)).astype(np.float32),
    np.where(np.random.default_rng(3).random((5, 7)) < 0.4, -np.inf, 0.5),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.dtype}{mask.shape}")
def test_masks_and_weights(mask: np.ndarray) -> None:
    layer = build(32, 8, 2, bias=True)
    query, key = inputs(3, 5, 32), inputs(3, 7, 32, seed=1)
    out, weights = layer(query, key, attn_mask=mask, need_weights=True)
    np.testing.assert_array_equal(out, layer(query, key, attn_mask=mask))
    for mine, theirs in zip((out, weights), by_reference(layer, query, key, attn_mask=mask), strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)
    masked = ~mask if mask.dtype == bool else mask == -np.inf
    assert weights.shape == (3, 8, 5, 7)
    assert (weights[np.broadcast_to(masked, weights.shape)] == 0).all()
    empty = np.broadcast_to(masked, weights.shape).all(-1)
    np.testing.assert_allclose(weights.sum(-1), ~empty, **TOLERANCE)
    values = layer.v_proj(key).reshape(3, 7, 2, 4).swapaxes(1, 2).repeat(4, axis=1)
    again = layer.o_proj((weights @ values).swapaxes(1, 2).reshape(3, 5, 32))
    np.testing.assert_allclose(out, again, **TOLERANCE)


@pytest.mark.parametrize(
    "mask", [None, np.tri(15, 7, dtype=bool).reshape(3, 1, 5, 7), np.ones((3, 1, 5, 7), np.float16)]
)
def test_weights_have_the_batch_of_the_output(mask: np.ndarray | None) -> None:
    layer, query, key, value = build(16, 4, 2), inputs(1, 5, 16), inputs(1, 7, 16, seed=1), inputs(3, 7, 16, seed=2)
    out, weights = layer(query, key, value, attn_mask=mask, need_weights=True)
    assert weights.shape == (3, 4, 5, 7)
    wanted = layer(query.repeat(3, 0), key.repeat(3, 0), value, attn_mask=mask, need_weights=True)
    for mine, theirs in zip((out, weights), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)


def test_weights_without_batch_with_causal_and_float64() -> None:
    layer, x = build(16, 4, 2, dtype="float64"), inputs(6, 16, dtype="float64")
    out, weights = layer(x, is_causal=True, need_weights=True)
    assert weights.shape == (4, 6, 6)
    assert weights.dtype == np.float64
    assert not np.triu(weights, 1).any()
    np.testing.assert_allclose(weights.sum(-1), 1)
    values = layer.v_proj(x).reshape(6, 2, 4).swapaxes(0, 1).repeat(2, axis=0)
    np.testing.assert_allclose(out, layer.o_proj((weights @ values).swapaxes(0, 1).reshape(6, 16)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of the projection, by NumPy
def test_nothing_leaks_from_masked_keys() -> None:
    layer, key = build(16, 4, 2), inputs(1, 6, 16)
    query, stale = inputs(1, 3, 16, seed=1), key.copy()
    stale[0, 4], stale[0, 5] = np.nan, np.inf
    mask = np.arange(6) < 4
    for mine, theirs in zip(layer(query, stale, attn_mask=mask, need_weights=True),
                            layer(query, key, attn_mask=mask, need_weights=True), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)
    assert np.isnan(layer(query, stale)).all()
    out, weights = layer(query, stale, attn_mask=np.zeros((3, 6), bool), need_weights=True)
    assert not weights.any()
    assert not out.any()


def test_huge_finite_masks_are_numbers() -> None:
    layer, x = build(16, 4, 2), inputs(4, 16)
    mask = np.where(np.tri(4, dtype=bool), 0, -1e300)
    _, weights = layer(x, attn_mask=mask, need_weights=True)
    _, wanted = layer(x, is_causal=True, need_weights=True)
    np.testing.assert_allclose(weights, wanted, **TOLERANCE)
    _, uniform = layer(x, attn_mask=np.full((4, 4), -1e300), need_weights=True)
    np.testing.assert_allclose(uniform, 0.25, **TOLERANCE)


def test_head_mask_multiplies_weights() -> None:
    layer, x = build(32, 8, 2, bias=True), inputs(2, 5, 32)
    factors = np.array([1, 0, 1, 2.5, 0, 1, 1, -1])
    plain, weights = layer(x, need_weights=True)
    out, scaled = layer(x, head_mask=factors, need_weights=True)
    np.testing.assert_allclose(scaled, weights * factors[:, None, None], **TOLERANCE)
    values = layer.v_proj(x).reshape(2, 5, 2, 4).swapaxes(1, 2).repeat(4, axis=1)
    np.testing.assert_allclose(out, layer.o_proj((scaled @ values).swapaxes(1, 2).reshape(2, 5, 32)), **TOLERANCE)
    np.testing.assert_array_equal(layer(x, head_mask=np.ones(8, int)), plain)
    np.testing.assert_array_equal(layer(x, head_mask=[True] * 8), plain)


def test_inputs_may_lie_anyhow_and_stay_as_they_were() -> None:
    layer, x = build(16, 4, 2), inputs(3, 7, 16)
    want = layer(x)
    for same in (np.asfortranarray(x), x[::-1][::-1], x.byteswap().view(">f4"), np.repeat(x, 2, -1)[..., ::2]):
        kept = same.copy()
        same.flags.writeable = False
        out = layer(same)
        np.testing.assert_allclose(out, want, **TOLERANCE)
        np.testing.assert_array_equal(same, kept)
        assert out.flags.c_contiguous
        assert out.dtype.isnative
    np.testing.assert_array_equal(layer(x.tolist()), want)
    np.testing.assert_array_equal(layer(torch.from_numpy(x)), want)


def test_empty_inputs() -> None:
    layer = build(16, 4, 2, bias=True)
    assert layer(inputs(0, 5, 16)).shape == (0, 5, 16)
    assert layer(inputs(2, 0, 16)).shape == (2, 0, 16)
    out, weights = layer(inputs(2, 3, 16), inputs(2, 0, 16), need_weights=True)
    assert weights.shape == (2, 4, 3, 0)
    np.testing.assert_array_equal(out, np.broadcast_to(layer.o_proj.bias, out.shape))


def test_a_causal_call_with_other_keys_warns_at_the_caller() -> None:
    with pytest.warns(UserWarning, match=r"^GroupedQueryAttention\.__call__\(\): is_causal with 3 query") as caught:
        build(16, 4, 2)(inputs(3, 16), inputs(5, 16), is_causal=True)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("layer", [build(16, 4, 2), MultiHeadAttention(16, 4), MultiQueryAttention(16, 4)], ids=repr)
def test_an_alignment_says_where_rows_stand(layer: GroupedQueryAttention, alignment: str) -> None:
    """As the warning proposes, and then without it."""
    query, key = inputs(3, 3, 16), inputs(3, 5, 16, seed=1)
    rules: dict[str, Any] = {"is_causal": True, "causal_alignment": alignment}
    out, weights = layer(query, key, need_weights=True, **rules)
    for mine, theirs in zip((out, weights), by_reference(layer, query, key, **rules), strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE)
    np.testing.assert_array_equal(layer(query[0], key[0], **rules), out[0])
    lengths = np.array([5, 4, 3])
    ragged = layer(query, key, kv_lengths=lengths, **rules)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(ragged[b], layer(query[b], key[b, :n], **rules), **TOLERANCE)


def test_an_alignment_is_for_windows_too() -> None:
    layer, query, key = build(16, 4, 2, window=(1, 0)), inputs(2, 16), inputs(6, 16, seed=1)
    _, weights = layer(query, key, causal_alignment="lower_right", need_weights=True)
    assert (weights[0] > 0).tolist() == [[False] * 3 + [True, True, False], [False] * 4 + [True, True]]


def test_sinks_and_slopes_that_are_infinite_come_back_from_the_repr() -> None:
    layer = GroupedQueryAttention(8, 2, 1, sinks=[-np.inf, np.nan], alibi_slopes=[np.inf, 0.5], rng=0)
    same = eval(repr(layer), vars(gqa_ext))
    np.testing.assert_array_equal(same.sinks, layer.sinks)
    assert (same.alibi_slopes == layer.alibi_slopes).all()
