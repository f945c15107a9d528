"""What the converter refuses before a weight is read, and what plans say, from headers alone."""

from __future__ import annotations

from typing import Any

import pytest

from gqa_ext.convert import Layout
from gqa_ext.convert.header import TensorInfo
from gqa_ext.convert.layouts import plan_model

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
PREFIX = "model.layers.{}.self_attn."


def llama(kv_heads: int = 8, dtype: str = "BF16", layers: int = 2) -> dict[str, TensorInfo]:
    tensors = {"model.embed_tokens.weight": TensorInfo(dtype, (100, 64))}
    for layer in range(layers):
        prefix = PREFIX.format(layer)
        for name in "qo":
            tensors[f"{prefix}{name}_proj.weight"] = TensorInfo(dtype, (64, 64))
        for name in "kv":
            tensors[f"{prefix}{name}_proj.weight"] = TensorInfo(dtype, (8 * kv_heads, 64))
    return tensors


def renamed(tensors: dict[str, TensorInfo], old: str, new: str) -> dict[str, TensorInfo]:
    return {name.replace(old, new): info for name, info in tensors.items()}


REFUSED = [
    ("quantization_config", CONFIG | {"quantization_config": {"quant_method": "gptq"}}, llama(), "gptq.*quantised"),
    ("GPTQ tensors", CONFIG, llama() | {"x.qweight": TensorInfo("I32", (8, 8))}, r"x\.qweight.*GPTQ or AWQ"),
    ("bitsandbytes", CONFIG, llama() | {"x.weight.absmax": TensorInfo("F32", (8,))}, "bitsandbytes 4-bit"),
    ("fp8 blocks", CONFIG, llama() | {"x.weight_scale_inv": TensorInfo("F32", (8,))}, "fp8 block-scaled"),
    ("fp8 tensors", CONFIG, llama(dtype="F8_E4M3"), "F8_E4M3.*fp8"),
    ("tensor-parallel config", CONFIG | {"tp_size": 2}, llama(), "tp_size 2.*tensor-parallel"),
    ("a rank's file", CONFIG, llama() | {"rank_0.x": TensorInfo("F32", (8,))}, "tensor-parallel rank"),
    ("a rank's shapes", CONFIG, {**llama(), PREFIX.format(0) + "q_proj.weight": TensorInfo("BF16", (32, 64))},
     "q_proj.*tensor-parallel ranks"),
    ("grouped", CONFIG | {"num_key_value_heads": 4}, llama(4), "grouped already: 4.*allow_gqa=True"),
    ("unknown", CONFIG | {"model_type": "mamba"}, llama(), "'mamba'.*llama.*bloom.*layout="),
    ("nested", {"model_type": "llava", "text_config": CONFIG}, llama(), "text_config.*layout="),
    ("a layer missing", CONFIG | {"num_hidden_layers": 3}, llama(), r"lack layers \[2\]"),
    ("v missing", CONFIG, {n: i for n, i in llama().items() if "1.self_attn.v_proj" not in n}, "1.*v_proj.*missing"),
    ("config and tensors", CONFIG | {"num_key_value_heads": 2}, llama(8), "num_key_value_heads 2.*8"),
    ("no heads", {"model_type": "llama"}, llama(), "num_heads is None"),
    ("odd heads", CONFIG | {"num_attention_heads": "8"}, llama(), "num_attention_heads '8'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "match"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_by_name(config: dict[str, Any], tensors: dict[str, TensorInfo], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan_model(config, tensors, 2)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_kv_heads": 3}, ValueError, "divisor of num_heads"),
    ({"num_kv_heads": [2, 2, 2]}, ValueError, "3 entries for 2 layers"),
    ({"num_kv_heads": [2, 4]}, ValueError, "output='expanded'"),
    ({"layers": [1]}, ValueError, "output='expanded'"),
    ({"layers": [2]}, ValueError, r"layers has \[2\]"),
    ({"layers": "01"}, TypeError, "layers is"),
    ({"method": "median"}, ValueError, "'median'"),
    ({"output": "gguf"}, ValueError, "'gguf'"),
    ({"groups": [[0, 1, 2, 3], [4, 5, 6, 6]]}, ValueError, r"lacks \[7\] and repeats \[6\]"),
    ({"groups": {7: [[0, 1, 2, 3], [4, 5, 6, 7]]}}, ValueError, "layers"),
    ({"layout": {"layer": "x", "qq": "y"}}, ValueError, "'qq'"),
    ({"layout": {"layer": 3}}, TypeError, r"layout\['layer'\]"),
]


@pytest.mark.parametrize(("choices", "error", "match"), ARGUMENTS)
def test_arguments(choices: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan_model(CONFIG, llama(), **({"num_kv_heads": 2} | choices))


def test_only_keys_and_values_change() -> None:
    plan = plan_model(CONFIG, llama(), 2)
    assert set(plan.tensors) == {f"{PREFIX.format(i)}{name}_proj.weight" for i in (0, 1) for name in "kv"}
    assert plan.config == CONFIG | {"num_key_value_heads": 2}
    assert [layer.num_kv_heads for layer in plan.layers] == [2, 2]


def test_as_many_heads_as_there_are_change_nothing() -> None:
    plan = plan_model(CONFIG, llama(), 8)
    assert not plan.tensors
    assert plan.config == CONFIG


def test_some_layers_expanded() -> None:
    plan = plan_model(CONFIG, llama(), 2, layers=[1], output="expanded")
    assert all(".1." in name for name in plan.tensors)
    assert plan.config.get("num_key_value_heads", 8) == 8
    assert plan_model(CONFIG, llama(), [8, 2], output="expanded").tensors == plan.tensors


def test_groups_for_one_layer() -> None:
    groups = [[7, 0, 1, 2], [3, 4, 5, 6]]
    plan = plan_model(CONFIG, llama(), 2, groups={1: groups})
    moved = {name for name in plan.tensors if name.endswith(("q_proj.weight", "o_proj.weight"))}
    assert moved == {f"{PREFIX.format(1)}{name}_proj.weight" for name in "qo"}
    assert plan.layers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert plan.layers[1].groups == tuple(map(tuple, groups))


def test_a_grouped_source_is_pooled_further() -> None:
    plan = plan_model(CONFIG | {"num_key_value_heads": 4}, llama(4), 2, allow_gqa=True)
    assert plan.tensors[PREFIX.format(0) + "k_proj.weight"].members == ((0, 1), (2, 3))
    with pytest.raises(ValueError, match="divisor of the source's"):
        plan_model(CONFIG | {"num_key_value_heads": 2}, llama(2), 4, allow_gqa=True)


def test_a_layout_by_hand() -> None:
    tensors = renamed(llama(), ".self_attn.", ".attn.")
    by_dict = plan_model(CONFIG | {"model_type": "mine"}, tensors, 2, layout={"layer": "layers.{layer}.attn."})
    by_class = plan_model(CONFIG | {"model_type": "mine"}, tensors, 2, layout=Layout(layer="layers.{layer}.attn."))
    assert by_dict == by_class
    assert set(by_dict.tensors) == {f"model.layers.{i}.attn.{name}_proj.weight" for i in (0, 1) for name in "kv"}


@pytest.mark.parametrize("names", ["q_proj k_proj v_proj out_proj", "q_proj k_proj v_proj o_proj", "q k v o"])
@pytest.mark.parametrize("prefix", ["", "attention.", "model.block."])
def test_lone_state_dicts(names: str, prefix: str) -> None:
    q, k, v, o = names.split()
    tensors = {f"{prefix}{name}.weight": TensorInfo("F32", (64, 64)) for name in (q, k, v, o)}
    tensors |= {f"{prefix}{name}.bias": TensorInfo("F32", (64,)) for name in (q, k, v, o)}
    plan = plan_model({}, tensors, 2, num_heads=8)
    assert set(plan.tensors) == {f"{prefix}{name}.{kind}" for name in (k, v) for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="num_heads is None"):
        plan_model({}, tensors, 2)


def test_bloom_keeps_heads_at_their_slopes() -> None:
    config = {"model_type": "bloom", "hidden_size": 64, "n_head": 8, "n_layer": 1}
    tensors = {"h.0.self_attention.query_key_value.weight": TensorInfo("F32", (192, 64)),
               "h.0.self_attention.query_key_value.bias": TensorInfo("F32", (192,)),
               "h.0.self_attention.dense.weight": TensorInfo("F32", (64, 64))}  # fmt: skip
    assert plan_model(config, tensors, 2, output="expanded").tensors
    with pytest.raises(ValueError, match="ALiBi"):
        plan_model(config, tensors, 2, groups=[[0, 2, 4, 6], [1, 3, 5, 7]], output="expanded")
