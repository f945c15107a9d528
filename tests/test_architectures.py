"""Every architecture of the table: a tiny model saved by transformers, converted, loaded by transformers again.

What pooling means is written down a second time here, in torch and on modules: `pool_in_place` puts the mean of each
group into every head of the group, so that the multi-head model itself becomes the reference for native and expanded
results alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gqa_ext.convert import convert_checkpoint
from gqa_ext.convert.architectures import ARCHITECTURES

HEADS, HEAD_DIM, HIDDEN, LAYERS, POOLED = 8, 8, 64, 2, 2

COMMON = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": 96}
SIZES = COMMON | {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = SIZES | {"num_key_value_heads": HEADS}


def heads_of(*modules: torch.nn.Linear) -> Iterator[Tensor]:
    """Weights and biases as (heads, head_dim, ...) views."""
    for module in modules:
        for tensor in (module.weight, module.bias):
            if tensor is not None:
                yield tensor.data.view(HEADS, HEAD_DIM, *tensor.shape[1:])


def separate(attention: Any) -> Iterator[Tensor]:
    yield from heads_of(attention.k_proj, attention.v_proj)


def with_head_norms(attention: Any) -> Iterator[Tensor]:
    """Cohere: k_norm (heads, head_dim); OLMo 2: (heads * head_dim,)."""
    yield from separate(attention)
    yield attention.k_norm.weight.data.view(HEADS, HEAD_DIM)


def stablelm(attention: Any) -> Iterator[Tensor]:
    yield from separate(attention)
    norms = [norm.weight.data for norm in attention.k_layernorm.norms]
    mean = [torch.stack(norms[g : g + HEADS // POOLED]).double().mean(0) for g in range(0, HEADS, HEADS // POOLED)]
    for h, norm in enumerate(norms):
        norm.copy_(mean[h // (HEADS // POOLED)])


def stacked(attention: Any) -> Iterator[Tensor]:
    yield from attention.qkv_proj.weight.data.view(3, HEADS, HEAD_DIM, HIDDEN)[1:]


def interleaved(attention: Any) -> Iterator[Tensor]:
    module = attention.query_key_value
    for tensor in (module.weight.data, module.bias.data):
        fused = tensor.view(HEADS, 3, HEAD_DIM, *tensor.shape[1:])
        yield from (fused[:, 1], fused[:, 2])


def conv1d(attention: Any) -> Iterator[Tensor]:
    weight = attention.c_attn.weight.data.view(HIDDEN, 3, HEADS, HEAD_DIM)
    bias = attention.c_attn.bias.data.view(3, HEADS, HEAD_DIM)
    for role in (1, 2):
        yield weight[:, role].transpose(0, 1)
        yield bias[role]


@dataclass(frozen=True)
class Family:
    model_type: str
    config: dict[str, Any]
    attention: str
    """The class of its attention modules, in part."""
    projections: Callable[[Any], Iterator[Tensor]] = separate
    """Of one module: what is pooled, as (heads, ...) views."""
    native: bool = True


FAMILIES = [
    Family("llama", LLAMA | {"attention_bias": True}, "LlamaAttention"),
    Family("mistral", LLAMA | {"sliding_window": 8}, "MistralAttention"),
    Family("qwen2", LLAMA, "Qwen2Attention"),
    Family("qwen3", LLAMA | {"head_dim": HEAD_DIM}, "Qwen3Attention"),
    Family("gemma", LLAMA | {"head_dim": HEAD_DIM}, "GemmaAttention"),
    Family("gemma2", LLAMA | {"head_dim": HEAD_DIM}, "Gemma2Attention"),
    Family("phi", LLAMA, "PhiAttention"),
    Family("stablelm", LLAMA | {"use_qkv_bias": True}, "StableLmAttention"),
    Family("stablelm", LLAMA | {"qk_layernorm": True}, "StableLmAttention", stablelm),
    Family("olmo", LLAMA, "OlmoAttention"),
    Family("olmo2", LLAMA, "Olmo2Attention", with_head_norms),
    Family("cohere", LLAMA, "CohereAttention"),
    Family("cohere", LLAMA | {"use_qk_norm": True}, "CohereAttention", with_head_norms),
    Family("phi3", LLAMA, "Phi3Attention", stacked),
    Family("gpt_neox", SIZES, "GPTNeoXAttention", interleaved, native=False),
    Family("gpt2", {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": 96, "n_positions": 64},
           "GPT2Attention", conv1d, native=False),
    Family("opt", COMMON | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": HIDDEN},
           "OPTAttention", native=False),
    Family("bloom", {"hidden_size": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": 96}, "BloomAttention",
           interleaved, native=False),
]  # fmt: skip

IDS = [f"{family.model_type}-{i}" for i, family in enumerate(FAMILIES)]


def test_every_row_of_the_table_is_here() -> None:
    assert {family.model_type for family in FAMILIES} == set(ARCHITECTURES)


def make(family: Family, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.for_model(family.model_type, **family.config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for name, parameter in model.named_parameters():  # norms of ones and biases of zeros would hide mistakes
        if parameter.ndim == 1 or "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def pool_in_place(model: Any, family: Family) -> None:
    """Every head becomes the mean of its group, rounded once to the model's dtype."""
    modules = [module for module in model.modules() if family.attention in type(module).__name__]
    assert len(modules) == LAYERS
    for module in modules:
        for heads in family.projections(module):
            for first in range(0, HEADS, HEADS // POOLED):
                group = heads[first : first + HEADS // POOLED]
                group.copy_(group.double().mean(0, keepdim=True).expand_as(group))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2 * 20).reshape(2, 20) % 90 + 1).logits.float()


def load(folder: Path, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_transformers_loads_what_pooling_means(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(family, dtype)
    shards = {} if dtype == torch.float32 else {"max_shard_size": "40KB"}
    model.save_pretrained(tmp_path / "src", **shards)
    assert len(list((tmp_path / "src").glob("*.safetensors"))) > 1 or not shards
    pool_in_place(model, family)
    wanted, bound = logits(model), 2e-5 if dtype == torch.float32 else 0.05  # of the largest logit
    convert_checkpoint(tmp_path / "src", tmp_path / "expanded", POOLED, output="expanded", progress=False)
    expanded = load(tmp_path / "expanded", dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(expanded.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(expanded), wanted, rtol=0, atol=bound * float(wanted.abs().max()))
    if not family.native:
        return
    convert_checkpoint(tmp_path / "src", tmp_path / "native", POOLED, progress=False)
    native = load(tmp_path / "native", dtype)
    assert native.config.num_key_value_heads == POOLED
    if family.model_type == "olmo2":
        return  # its norm runs over all key heads together, and a mean over fewer is another number
    torch.testing.assert_close(logits(native), wanted, rtol=0, atol=bound * float(wanted.abs().max()))


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.native], ids=lambda f: f.model_type)
def test_a_format_without_groups_is_refused_with_the_way_out(family: Family, tmp_path: Path) -> None:
    make(family, torch.float32).save_pretrained(tmp_path / "src")
    with pytest.raises(ValueError, match="output='expanded'"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", POOLED, progress=False)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_explicit_groups_permute_what_belongs_together(family: Family, tmp_path: Path) -> None:
    """Groups of one head each, in another order: the same function, and so the same logits."""
    model = make(family, torch.float32)
    model.save_pretrained(tmp_path / "src")
    wanted = logits(model)
    groups = [[head] for head in (3, 0, 7, 1, 6, 2, 5, 4)]
    arguments = (tmp_path / "src", tmp_path / "dst", HEADS)
    if family.model_type == "bloom":
        with pytest.raises(ValueError, match="ALiBi"):
            convert_checkpoint(*arguments, groups=groups, output="expanded", progress=False)
        return
    convert_checkpoint(*arguments, groups=groups, output="expanded", progress=False)
    got = logits(load(tmp_path / "dst", torch.float32))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))
