"""gqa_ext.llama against transformers: every family it reads, through prefill, chunks and decode, in shards too."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from gqa_ext import GroupedQueryAttention, __main__, llama
from gqa_ext.convert import safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 150, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# name: family, what its config has beside SMALL
MODELS = {
    "llama": ("Llama", {}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama, longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "llama, biases": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral, all": ("Mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    "mistral, its window": ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding": ("Qwen2", SLIDING),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3, its head_dim": ("Qwen3", {"num_key_value_heads": 3}),
    "qwen3, biases, sliding": ("Qwen3", {"head_dim": 8, "attention_bias": True, "layer_types": MIXED} | SLIDING),
}
BY_LENGTH = ("llama, dynamic", "llama, longrope")  # the rope of a call depends on how far it goes
LENGTH = 40


def make(name: str):
    """A model with weights that matter: biases and norms are random as well."""
    family, extra = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**SMALL | copy.deepcopy(extra))
    config._attn_implementation = "eager"
    model = getattr(transformers, family + "ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For a name: the folder, our model, tokens (2, LENGTH) and the logits that transformers gives them."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            model = make(name)
            model.save_pretrained(folder)
            tokens = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, LENGTH))
            with torch.no_grad():
                want = model(torch.from_numpy(tokens)).logits.numpy()
            made[name] = folder, llama.load(folder), tokens, want
        return made[name]

    return get


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_text(saved, name):
    _, model, tokens, want = saved(name)
    close(model.forward(tokens), want)
    close(model.forward(tokens[1]), want[1])


@pytest.mark.parametrize("chunks", [[LENGTH], [17, 1, 1, 9, 12], [1] * LENGTH], ids=["prefill", "chunks", "decode"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
def test_a_cached_text(saved, name, chunks):
    _, model, tokens, want = saved(name)
    cache = model.new_cache(LENGTH, (2,))
    stops = np.cumsum(chunks)
    parts = [model.forward(tokens[:, stop - size : stop], cache) for size, stop in zip(chunks, stops, strict=True)]
    close(np.concatenate(parts, axis=1), want)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_rope_is_chosen_for_each_call_as_transformers_does(saved, name):
    """A key keeps the angle of its own call, so a text that grows past 16 tokens is no longer that of one call."""
    folder, model, tokens, _ = saved(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    cache, past = model.new_cache(LENGTH, (2,)), transformers.DynamicCache()
    for start in range(0, LENGTH, 10):
        part = tokens[:, start : start + 10]
        with torch.no_grad():
            want = theirs(torch.from_numpy(part), past_key_values=past, use_cache=True).logits.numpy()
        close(model.forward(part, cache), want)


@pytest.mark.parametrize("name", ["llama, llama3", "mistral", "qwen3"])
def test_greedy_generation(saved, name):
    folder, model, tokens, _ = saved(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.from_numpy(tokens[:1, :12])
    with torch.no_grad():
        want = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(model.generate(tokens[0, :12], 20)) == want[0, 12:].tolist()


def test_windows_are_those_of_the_config(saved):
    sliding = {name: saved(name)[1].config.layer_windows for name in ("mistral", "qwen2", "qwen2, sliding")}
    assert sliding == {"mistral": (7, 7, 7), "qwen2": (None,) * 3, "qwen2, sliding": (None, 5, 5)}
    assert saved("qwen3, biases, sliding")[1].config.layer_windows == (5, None, 5)


def test_a_sliding_layer_keeps_its_window_only(saved):
    _, model, tokens, want = saved("qwen2, sliding")
    cache = model.new_cache(LENGTH, dtype="float32")
    rows = [model.forward([token], cache)[0] for token in tokens[0]]
    close(np.array(rows), want[0])
    assert [layer.nbytes for layer in cache] == [2 * 2 * 8 * 4 * keys for keys in (LENGTH, 5, 5)]


def test_pooling_takes_biases_along(saved):
    """Key/value heads made alike, biases too, pool to one without loss."""
    _, model, tokens, _ = saved("qwen3, biases, sliding")
    names = ("k_proj", "v_proj", "k_bias", "v_bias")
    alike = [
        dataclasses.replace(layer, **{name: np.concatenate([getattr(layer, name)[:8]] * 2) for name in names})
        for layer in model.layers
    ]
    model = dataclasses.replace(model, layers=tuple(alike))
    pooled = model.pooled(1)
    close(pooled.forward(tokens), model.forward(tokens))
    assert model.num_parameters - pooled.num_parameters == 3 * 2 * 8 * (48 + 1)


def test_parameters_are_counted(saved):
    for name in ("llama, biases", "qwen2", "qwen3"):
        assert saved(name)[1].num_parameters == make(name).num_parameters()


def test_the_command_on_a_folder(saved, capsys):
    """With a tokenizer.json of words, as transformers leaves it beside the model."""
    library = pytest.importorskip("tokenizers")
    folder, model, tokens, _ = saved("qwen3")
    words = library.Tokenizer(library.models.WordLevel({f"w{i}": i for i in range(SMALL["vocab_size"])}, "w0"))
    words.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    prompt = " ".join(f"w{token}" for token in tokens[0, :9])
    words = ["--prompt", prompt, "--max-new-tokens", "20", "--kv-dtype", "float16"]
    assert __main__.main(["generate", str(folder), *words]) == 0
    text, figures = capsys.readouterr().out.rstrip("\n").rsplit("\n\n", 1)
    made = [f"w{token}" for token in model.generate(tokens[0, :9], 20, kv_dtype="float16") if token]
    assert [word for word in text.split() if word != "w0"] == prompt.split() + made
    assert "KV cache 240 bytes per token, 6,960 bytes in all, float16" in figures


# ---- files ----


@pytest.fixture
def shards(tmp_path):
    model = make("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_shards_are_one_model(saved, shards):
    _, model, tokens, _ = saved("qwen2")
    np.testing.assert_array_equal(llama.load(shards).forward(tokens), model.forward(tokens))


def rewritten(saved, name, target, drop, change):
    """The folder of a name, but for entries of config.json; and the tokens and logits that transformers now gives."""
    folder, _, tokens, _ = saved(name)
    config = json.loads((folder / "config.json").read_text())
    del config[drop]
    (target / "config.json").write_text(json.dumps(config | change))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    with torch.no_grad():
        return tokens, theirs(torch.from_numpy(tokens)).logits.numpy()


def without(rope, *keys):
    return {key: rope[key] for key in rope if key not in keys}


ORIGINAL = "original_max_position_embeddings"
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500.0, "rope_scaling": without(LLAMA3, "rope_theta")},
        *(
            {"rope_theta": 500.0, "rope_scaling": without(rope, "rope_theta", ORIGINAL), ORIGINAL: 16}
            for rope in (YARN, LONGROPE, LLAMA3)
        ),
        {"rope_parameters": without(LONGROPE, "factor"), ORIGINAL: 32},  # and the dict says 16
        {"rope_parameters": YARN, ORIGINAL: 512},
        {"rope_scaling": LINEAR, ORIGINAL: 16},  # linear does not read it
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": LINEAR, "rope_parameters": YARN, "rope_theta": 500.0},
        {"rope_scaling": {}, "rope_parameters": YARN},
        {"rope_theta": 500.0, "partial_rotary_factor": 1.0},
    ],
)
def test_rope_of_older_and_mixed_configs(saved, tmp_path, change):
    """Files before transformers 5 keep parts of the dict beside it, or have it under two names."""
    tokens, want = rewritten(saved, "llama", tmp_path, "rope_parameters", change)
    close(llama.load(tmp_path).forward(tokens), want)
    assert np.abs(want - saved("llama")[3]).max() > 0.01 * np.abs(want).max()


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({}, (None, 5, 5)),
        ({"use_sliding_window": False}, (None, None, None)),
        ({"max_window_layers": 2}, (None, None, 5)),
        ({"max_window_layers": 28}, (None, None, None)),
        ({"sliding_window": None}, (None, None, None)),
    ],
)
def test_windows_without_layer_types(saved, tmp_path, change, windows):
    """As files before transformers 4.53 have them; the model that it makes of them gives the same logits."""
    tokens, want = rewritten(saved, "qwen2, sliding", tmp_path, "layer_types", change)
    model = llama.load(tmp_path)
    assert model.config.layer_windows == windows
    close(model.forward(tokens), want)


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"use_sliding_window": False}, (6, 6, 6)),
        ({"max_window_layers": 2}, (6, 6, 6)),
        ({"use_sliding_window": True, "max_window_layers": 28}, (6, 6, 6)),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, (None, 6, None)),
    ],
)
def test_mistral_reads_no_keys_of_qwen2(saved, tmp_path, change, windows):
    """Nor does its code in transformers; layer_types make it a Ministral there."""
    tokens, want = rewritten(saved, "mistral", tmp_path, "sliding_window", {"sliding_window": 6} | change)
    model = llama.load(tmp_path)
    assert model.config.layer_windows == windows
    close(model.forward(tokens), want)
    layers = [GroupedQueryAttention.from_checkpoint(tmp_path, i) for i in range(3)]
    assert [layer.window and layer.window[0] + 1 for layer in layers] == list(windows)


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", 3, "a\\b", "c:d"])
def test_shards_lie_in_the_folder(shards, shard):
    rewrite_index(shards, lambda names: names.update({"model.norm.weight": shard}))
    with pytest.raises(ValueError, match=r"index\.json: model\.norm\.weight lies in .*plain name"):
        llama.load(shards)


def test_broken_shards(shards):
    index = shards / "model.safetensors.index.json"
    text = index.read_text()
    rewrite_index(shards, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight of .* is not in the index"):
        llama.load(shards)
    first = json.loads(text)["weight_map"]["model.embed_tokens.weight"]
    index.write_text(text)
    rewrite_index(shards, lambda names: names.update({"model.none.weight": first}))
    with pytest.raises(ValueError, match=r"model\.none\.weight is not in model-"):
        llama.load(shards)
    for broken in ("[]", '{"weight_map": []}', "{"):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json"):
            llama.load(shards)
    index.write_text(text)
    (shards / first).unlink()
    with pytest.raises(FileNotFoundError, match=first):
        llama.load(shards)


def test_a_missing_bias_is_named(saved, tmp_path):
    folder = saved("qwen2")[0]
    arrays = dict(safetensors.SafetensorsFile(folder / "model.safetensors"))
    del arrays["model.layers.1.self_attn.v_proj.bias"]
    safetensors.save(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.bias is missing"):
        llama.load(tmp_path)
