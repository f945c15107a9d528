"""GroupedQueryAttention.from_checkpoint against transformers' own attention, in a whole model of each architecture."""

import json

import numpy as np
import pytest
import torch
import transformers
from checkpoints import write_model
from safetensors.numpy import save_file

from gqa_ext import GroupedQueryAttention, MultiHeadAttention, RotaryEmbedding

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 6.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip

MODELS = {
    "llama": GROUPED,
    "llama, biases and scaled rope": {**GROUPED, "attention_bias": True, "rope_parameters": LLAMA3},
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {**GROUPED, "head_dim": 12},
    "qwen3, windows in all layers": {**GROUPED, "head_dim": 12, "use_sliding_window": True, "sliding_window": 4,
                                     "max_window_layers": 0, "rms_norm_eps": 0.1},
    "gemma": {**GROUPED, "head_dim": 12},
    "gemma2": {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 50, "sliding_window": 4,
               "attn_logit_softcapping": 2.0},
    "phi": GROUPED,
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "olmo": GROUPED,
    "cohere": GROUPED,
    "phi3": {**GROUPED, "sliding_window": 5},
    "phi3, longrope": {**GROUPED, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "gpt_neox": {},
    "gpt2": {},
    "gpt2, scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
}  # fmt: skip
TOKENS = 11
ATTENTION = {"gpt_neox": "attention", "gpt2": "attn", "bloom": "self_attention"}
# Of the largest output: two orders of sums in float32 over 32 numbers, and a softmax.
BOUND = 2e-6


def saved(folder, name, dtype=torch.float32, **changes):
    """A random model, its weights not as small as at the start of training; saved, and loaded as float32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.partition(",")[0], **{**SMALL, **MODELS.get(name, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def seen(model, number):
    """What layer `number`'s attention got and gave while the model read some tokens."""
    end = "." + ATTENTION.get(model.config.model_type, "self_attn")
    module = [part for name, part in model.named_modules() if name.endswith(end)][number]
    calls = []
    hook = module.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(torch.arange(2 * TOKENS).reshape(2, TOKENS) % 37 + 3)
    hook.remove()
    positional, named, result = calls[0]
    given = named["hidden_states"] if "hidden_states" in named else positional[0]
    out = result[0]
    if model.config.model_type == "bloom":  # adds what comes from before the layer
        out = out - (named["residual"] if "residual" in named else positional[1])
    return given.numpy(), out.numpy()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS),
     *((name, torch.bfloat16) for name in ("llama", "qwen3", "phi3", "gpt_neox", "gpt2"))],
)  # fmt: skip
def test_as_in_transformers(tmp_path, name, dtype):
    model = saved(tmp_path, name, dtype)
    for number in range(2):
        given, wanted = seen(model, number)
        out = GroupedQueryAttention.from_checkpoint(tmp_path, number)(given, is_causal=True)
        assert out.dtype == np.float32
        assert np.abs(out - wanted).max() <= BOUND * np.abs(wanted).max()
    assert not np.array_equal(given, wanted)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("olmo2", {}, r"tensor model\.layers\.0\.self_attn\.[qk]_norm\.weight"),
        ("cohere", {"use_qk_norm": True}, r"self_attn\.[qk]_norm\.weight"),
        ("phi", {"qk_layernorm": True}, r"self_attn\.[qk]_layernorm\.(weight|bias)"),
        ("stablelm", {"qk_layernorm": True}, r"self_attn\.[qk]_layernorm\.norms\.\d\.weight"),
        ("olmo", {"clip_qkv": 1.0}, "clip_qkv 1.0"),
        ("gemma2", {"head_dim": 8, "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; 1.0 was wanted, as llama turns whole"),
    ],
)  # fmt: skip
def test_what_the_module_lacks_is_named(tmp_path, name, changes, named):
    saved(tmp_path, name, **changes)
    with pytest.raises(NotImplementedError, match=named):
        GroupedQueryAttention.from_checkpoint(tmp_path, 0)


def test_older_configs_keep_rope_beside(tmp_path):
    """Phi-3's first files: type "su", theta and original length at the top level."""
    saved(tmp_path, "phi3, longrope")
    new = GroupedQueryAttention.from_checkpoint(tmp_path, 0).rope
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "original_max_position_embeddings": 32}
    config["rope_scaling"] = {"type": "su", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = GroupedQueryAttention.from_checkpoint(tmp_path, 0).rope
    for positions in (np.arange(5), np.arange(40)):
        assert np.array_equal(old.cos_sin(positions), new.cos_sin(positions))


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.5}),
        ("gpt_neox", {"rotary_emb_base": 500, "rotary_pct": 0.45}),  # an odd size, rounded up to whole pairs
        ("phi", {"rope_theta": 500.0, "partial_rotary_factor": 0.75, "rope_scaling": None}),
        ("llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}),
        ("phi3", {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 8}}),
        ("stablelm", {}),
        ("cohere", {}),
    ],
)
def test_older_configs_mean_what_transformers_takes_them_for(tmp_path, name, beside):
    """Entries of before rope_parameters, or none."""
    saved(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | beside))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    given, wanted = seen(model, 0)
    out = GroupedQueryAttention.from_checkpoint(tmp_path, 0)(given, is_causal=True)
    assert np.abs(out - wanted).max() <= BOUND * np.abs(wanted).max()


def test_shards_file_and_folder_are_one(tmp_path):
    folders = [write_model(tmp_path / str(shards), shards) for shards in (1, 3)]
    layers = [GroupedQueryAttention.from_checkpoint(folder, 2) for folder in folders]
    layers.append(GroupedQueryAttention.from_checkpoint(folders[0] / "model.safetensors", 2))
    states = [layer.state_dict() for layer in layers]
    assert all(np.array_equal(states[0][name], state[name]) for state in states for name in states[0])
    assert {repr(layer) for layer in layers} == {repr(layers[0])}


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_lone_state_dict_comes_back(tmp_path, ending):
    options = {"head_dim": 6, "bias": True, "qk_norm": 1e-3, "rope": RotaryEmbedding(6), "sinks": np.ones(4)}
    layer = GroupedQueryAttention(24, 4, 2, **options, rng=0)
    path = tmp_path / f"layer.{ending}"
    (save_file if ending == "safetensors" else lambda state, file: np.savez(file, **state))(layer.state_dict(), path)
    with pytest.raises(ValueError, match="num_heads"):
        GroupedQueryAttention.from_checkpoint(path, 0)
    with pytest.raises(ValueError, match="qk_norm"):
        GroupedQueryAttention.from_checkpoint(path, 0, num_heads=4)
    same = GroupedQueryAttention.from_checkpoint(path, 0, num_heads=4, qk_norm=1e-3, rope=options["rope"])
    x = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32)
    assert np.array_equal(same(x), layer(x))


def test_torchs_module_comes_too(tmp_path):
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    save_file({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, tmp_path / "a.safetensors")
    layer = GroupedQueryAttention.from_checkpoint(tmp_path / "a.safetensors", 0, num_heads=4)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        wanted = theirs(x, x, x)[0].numpy()
    assert np.abs(layer(x.numpy()) - wanted).max() <= BOUND * 10 * np.abs(wanted).max()
    theirs = torch.nn.MultiheadAttention(24, 4, add_bias_kv=True)
    save_file({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, tmp_path / "b.safetensors")
    with pytest.raises(NotImplementedError, match=r"bias_[kv]"):
        GroupedQueryAttention.from_checkpoint(tmp_path / "b.safetensors", 0, num_heads=4)


def test_layout_and_options(tmp_path):
    names = {"wq": (24, 24), "wk": (12, 24), "wv": (12, 24), "wo": (24, 24)}
    rng = np.random.default_rng(0)
    arrays = {f"block.{i}.{name}": rng.standard_normal(shape) for i in range(2) for name, shape in names.items()}
    save_file(arrays, tmp_path / "a.safetensors")
    layout = {"layer": "block.{layer}.", "q": "wq", "k": "wk", "v": "wv", "o": "wo"}
    layer = GroupedQueryAttention.from_checkpoint(
        tmp_path / "a.safetensors", 1, num_heads=4, layout=layout, window=(2, 0), softcap=3.0
    )
    assert repr(layer) == "GroupedQueryAttention(24, 4, 2, window=(2, 0), softcap=3.0, dtype='float64')"
    assert np.array_equal(layer.k_proj.weight, arrays["block.1.wk"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": "wide"}),
        ("mistral", {"sliding_window": 0}),
        ("gemma2", {"layer_types": ["full_attention"]}),
        ("gemma2", {"query_pre_attn_scalar": -1}),
        ("llama", {"rope_parameters": {"rope_type": "new"}}),
        ("llama", {"rope_parameters": None, "rope_theta": "ten"}),
    ],
)
def test_an_entry_that_means_nothing_is_named(tmp_path, name, changes):
    write_model(tmp_path, model_type=name, head_dim=4, **changes)
    entry = r"rope_(type|theta)" if name == "llama" else next(iter(changes))
    with pytest.raises(ValueError, match=entry):
        GroupedQueryAttention.from_checkpoint(tmp_path, 2)


def test_wrong_calls(tmp_path):
    folder = write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"from_checkpoint\(\): layer is 3 .* 0 to 2 were wanted"):
        GroupedQueryAttention.from_checkpoint(folder, 3)
    with pytest.raises(FileNotFoundError, match=r"from_checkpoint\(\): path .*nowhere does not exist"):
        GroupedQueryAttention.from_checkpoint(tmp_path / "nowhere", 0)
    with pytest.raises(TypeError, match="colour"):
        GroupedQueryAttention.from_checkpoint(folder, 0, colour=1)
    assert type(MultiHeadAttention.from_checkpoint(folder, 0)) is GroupedQueryAttention
