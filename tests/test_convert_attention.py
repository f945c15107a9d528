"""convert_attention against pool_heads, torch and our own attention."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import gqa_ext
from gqa_ext.convert import convert_attention, pool_heads

HEADS, HEAD_DIM, EMBED = 8, 6, 48
GROUPS = [[5, 0], [1, 7], [2, 3], [6, 4]]


def layer(dtype: Any = np.float32, out: str = "o_proj", bias: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ("q_proj", "k_proj", "v_proj", out)
    arrays = {f"{name}.weight": rng.standard_normal((EMBED, EMBED)).astype(dtype) for name in names}
    return arrays | {f"{name}.bias": rng.standard_normal(EMBED).astype(dtype) for name in names if bias}


def module(arrays: dict[str, np.ndarray], num_kv_heads: int) -> gqa_ext.GroupedQueryAttention:
    made = gqa_ext.GroupedQueryAttention(EMBED, HEADS, num_kv_heads, bias=True)
    made.load_state_dict(arrays)
    return made


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_keys_and_values_are_those_of_pool_heads(dtype: Any, method: str) -> None:
    arrays = layer(dtype)
    result = convert_attention(arrays, HEADS, 2, method=method).weights
    assert list(result) == list(arrays)
    for name, array in arrays.items():
        if name[0] in "kv":
            np.testing.assert_array_equal(result[name], pool_heads(array, HEADS, 2, method=method))
        else:
            assert result[name] is array


def test_head_weights_are_those_of_pool_heads() -> None:
    weights = [1, 0, 2, 1, 1, 1, 5, 1]
    result = convert_attention(layer(), HEADS, 2, head_weights=weights).weights
    wanted = pool_heads(layer()["k_proj.weight"], HEADS, 2, weights=weights)
    np.testing.assert_array_equal(result["k_proj.weight"], wanted)


def test_explicit_groups_give_what_their_heads_give() -> None:
    """Expanded and native results are one function, the one whose heads share the mean of their group."""
    arrays, x = layer(np.float64), np.random.default_rng(1).standard_normal((2, 5, EMBED)).astype(np.float32)
    shared = {name: array.copy() for name, array in arrays.items()}
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = shared[name].reshape(HEADS, HEAD_DIM, *shared[name].shape[1:])
        for group in GROUPS:
            heads[group] = heads[group].mean(0)
    wanted = module(shared, HEADS)(x)
    native = convert_attention(arrays, HEADS, 4, groups=GROUPS)
    np.testing.assert_allclose(module(native.weights, 4)(x), wanted, rtol=1e-5, atol=1e-4)  # of about 90
    expanded = convert_attention(arrays, HEADS, 4, groups=GROUPS, output="expanded")
    np.testing.assert_allclose(module(expanded.weights, HEADS)(x), wanted, rtol=1e-5, atol=1e-4)  # of about 90
    assert native.groups == tuple(map(tuple, GROUPS))
    assert native.key_error == pytest.approx(expanded.key_error)
    before, after = arrays["k_proj.weight"], shared["k_proj.weight"]
    assert native.key_error == pytest.approx(np.linalg.norm(before - after) / np.linalg.norm(before))


def test_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    source = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    state = {name: tensor.detach().numpy() for name, tensor in source.state_dict().items()}
    expanded = convert_attention(state, HEADS, 2, output="expanded").weights
    source.load_state_dict({name: torch.from_numpy(array) for name, array in expanded.items()})
    x = torch.randn(2, 7, EMBED)
    ours = gqa_ext.GroupedQueryAttention.from_mha(state, 2, num_heads=HEADS)
    np.testing.assert_allclose(ours(x.numpy()), source(x, x, x)[0].detach().numpy(), atol=1e-5)


def test_torch_multihead_attention_of_other_keys_pools_the_stacked_bias() -> None:
    """With kdim torch keeps three weights but one bias; the expanded layer is one that torch itself runs."""
    torch.manual_seed(0)
    mha = torch.nn.MultiheadAttention(EMBED, HEADS, kdim=20, vdim=20, batch_first=True)
    torch.nn.init.normal_(mha.in_proj_bias)
    state = {name: tensor.detach().numpy() for name, tensor in mha.state_dict().items()}
    native, expanded = (convert_attention(state, HEADS, 2, output=output).weights for output in ("native", "expanded"))
    q, k, v = np.split(state["in_proj_bias"], 3)
    k, v = (pool_heads(bias, HEADS, 2) for bias in (k, v))
    np.testing.assert_array_equal(native["in_proj_bias"], np.concatenate([q, k, v]))
    ours = gqa_ext.GroupedQueryAttention(EMBED, HEADS, 2, kv_embed_dim=20, bias=True)
    ours.load_state_dict(native)
    mha.load_state_dict({name: torch.from_numpy(array) for name, array in expanded.items()})
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 3, EMBED), np.float32), rng.standard_normal((2, 4, 20), np.float32)
    wanted = mha(*map(torch.from_numpy, (query, key, key)), need_weights=False)[0]
    np.testing.assert_allclose(ours(query, key), wanted.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["bias_k", "bias_v"])
def test_extra_keys_are_refused(name: str) -> None:
    mha = torch.nn.MultiheadAttention(EMBED, HEADS).state_dict() | {name: torch.zeros(1, 1, EMBED)}
    with pytest.raises(ValueError, match=f"tensor {name} is an extra key"):
        convert_attention({key: tensor.numpy() for key, tensor in mha.items()}, HEADS, 2)


def test_torch_tensors_and_prefixes() -> None:
    tensors = {f"layers.3.{name}": torch.from_numpy(array) for name, array in layer(out="out_proj").items()}
    result = convert_attention(tensors, HEADS, 2).weights
    assert result["layers.3.k_proj.weight"].shape == (2 * HEAD_DIM, EMBED)


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([1], {}, TypeError, "weights is a list"),
    ({}, {}, ValueError, "no attention of known names"),
    ({"q_proj.weight": np.ones((48, 48), complex)}, {}, TypeError, "complex128"),
    (layer(), {"num_kv_heads": 3}, ValueError, "num_kv_heads is 3"),
    (layer(), {"num_heads": 7}, ValueError, "7"),
    (layer(), {"method": "best"}, ValueError, "'best'"),
    (layer(), {"method": "first", "head_weights": [1] * 8}, ValueError, "method='first'"),
    (layer(), {"groups": [[0]]}, ValueError, "partition"),
    (layer(), {"output": "both"}, ValueError, "'both'"),
    ({k: v[: EMBED // 2] if k[0] in "kv" else v for k, v in layer().items()}, {}, ValueError, "allow_gqa=True"),
    ({f"{i}.{k}": v for i in range(2) for k, v in layer().items()}, {}, ValueError, "2 layers"),
    (layer(np.int8), {}, ValueError, "I8"),
]


@pytest.mark.parametrize(("weights", "changes", "error", "match"), BAD)
def test_refusals(weights: Any, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"num_heads": HEADS, "num_kv_heads": 2} | changes
    with pytest.raises(error, match=rf"convert_attention\(\).*{match}"):
        convert_attention(weights, arguments.pop("num_heads"), arguments.pop("num_kv_heads"), **arguments)


def test_a_grouped_layer_is_pooled_further() -> None:
    grouped = {k: v[: EMBED // 2] if k[0] in "kv" else v for k, v in layer().items()}
    result = convert_attention(grouped, HEADS, 2, allow_gqa=True).weights
    np.testing.assert_array_equal(result["v_proj.weight"], pool_heads(grouped["v_proj.weight"], 4, 2))
