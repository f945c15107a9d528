"""gqa_ext.llama: the forward pass against torch, caches against no caches, and files it must refuse."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gqa_ext import KVCache, llama
from gqa_ext.convert import safetensors

TEXT = "Grouped heads share keys.\n" * 4

# every way in which a Llama can differ from the shipped one: groups, untied, a head_dim of its own, one layer
GROUPED = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers writes them."""
    e, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, k = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    block = {
        "input_layernorm": (e,),
        "self_attn.q_proj": (q, e),
        "self_attn.k_proj": (k, e),
        "self_attn.v_proj": (k, e),
        "self_attn.o_proj": (e, q),
        "post_attention_layernorm": (e,),
        "mlp.gate_proj": (f, e),
        "mlp.up_proj": (f, e),
        "mlp.down_proj": (e, f),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], e), "model.norm.weight": (e,)}
    for index, (name, shape) in itertools.product(range(config["num_hidden_layers"]), block.items()):
        shapes[f"model.layers.{index}.{name}.weight"] = shape
    return shapes | {"lm_head.weight": (config["vocab_size"], e)}


def random_weights(config: dict, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def write_model(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save(folder / "model.safetensors", weights)
    return folder


@pytest.fixture
def grouped(tmp_path: Path) -> llama.Llama:
    return llama.load(write_model(tmp_path, GROUPED, random_weights(GROUPED)))


@pytest.fixture(scope="module")
def tiny() -> llama.Llama:
    return llama.load()


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The model written a second time, in torch, from the files alone."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    config = {"tie_word_embeddings": False} | json.loads((folder / "config.json").read_text())
    raw = pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in raw.items()}
    dim, heads = config["head_dim"], config["num_attention_heads"]

    def norm(x, name):
        return functional.rms_norm(x, x.shape[-1:], weights[name + ".weight"], config["rms_norm_eps"])

    def linear(x, name):
        return x @ weights[name + ".weight"].T

    exponents = torch.arange(dim // 2, dtype=torch.float64) * 2 / dim
    angles = torch.outer(torch.arange(tokens.shape[-1], dtype=torch.float64), config["rope_theta"] ** -exponents)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def rope(x):
        turned = torch.complex(*x.chunk(2, -1)) * turn  # the pair (x[i], x[i + D/2]) as one complex number
        return torch.cat([turned.real, turned.imag], -1)

    x = weights["model.embed_tokens.weight"][torch.from_numpy(tokens)]
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        h = norm(x, block + "input_layernorm")
        q, k, v = (
            linear(h, block + f"self_attn.{name}_proj").unflatten(-1, (-1, dim)).transpose(-2, -3) for name in "qkv"
        )
        k, v = (part.repeat_interleave(heads // part.shape[-3], -3) for part in (rope(k), v))
        out = functional.scaled_dot_product_attention(rope(q), k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        x = x + linear(out, block + "self_attn.o_proj")
        h = norm(x, block + "post_attention_layernorm")
        gated = functional.silu(linear(h, block + "mlp.gate_proj")) * linear(h, block + "mlp.up_proj")
        x = x + linear(gated, block + "mlp.down_proj")
    x = norm(x, "model.norm")
    return linear(x, "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head").numpy()


def test_the_shipped_model_equals_torch(tiny):
    tokens = tiny.encode((llama.TINY / "heldout.txt").read_bytes()[:600]).reshape(2, 300)
    np.testing.assert_allclose(tiny.forward(tokens), torch_logits(llama.TINY, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_grouped_untied_model_equals_torch(tmp_path, dtype):
    folder = write_model(tmp_path, GROUPED, random_weights(GROUPED, dtype))
    tokens = np.random.default_rng(1).integers(0, 300, (2, 3, 17))
    logits = llama.load(folder).forward(tokens)
    assert logits.shape == (2, 3, 17, 300)
    assert logits.dtype == np.float32
    want = torch_logits(folder, tokens.reshape(6, 17)).reshape(logits.shape)
    np.testing.assert_allclose(logits, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[29], [1] * 29, [7, 1, 20, 1], [28, 1]])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_chunks_equal_the_whole(grouped, chunks, batch):
    tokens = np.random.default_rng(2).integers(0, 300, (*batch, 29))
    cache = grouped.new_cache(29, batch)
    stops = np.cumsum(chunks)
    parts = [grouped.forward(tokens[..., stop - size : stop], cache) for size, stop in zip(chunks, stops, strict=True)]
    assert all((layer.lengths == 29).all() and layer.capacity == 29 for layer in cache)
    np.testing.assert_allclose(np.concatenate(parts, axis=-2), grouped.forward(tokens), atol=2e-5)


def test_no_sequences_have_no_logits(grouped):
    assert grouped.forward(np.zeros((0, 5), int)).shape == (0, 5, 300)
    assert grouped.forward(np.zeros((2, 0, 5), int), grouped.new_cache(5, (2, 0))).shape == (2, 0, 5, 300)


def test_greedy_generation_equals_forward_without_a_cache(tiny):
    tokens = list(TEXT[:30].encode())
    for token in tiny.generate(TEXT[:30], 25):
        assert token == np.argmax(tiny.forward(tokens)[-1])
        tokens.append(token)
    assert len(tokens) == 55


def test_sampling_follows_the_softmax(grouped):
    logits = grouped.forward([5])[0].astype(np.float64) / 2.0
    want = np.exp(logits - logits.max())
    want /= want.sum()
    draws = [next(grouped.generate([5], 1, temperature=2.0, seed=seed)) for seed in range(2000)]
    seen = np.bincount(draws, minlength=300) / len(draws)
    assert abs(seen - want).sum() < 0.5  # total variation of 2000 draws; that of the uniform distribution is larger
    assert abs(1 / 300 - want).sum() > 0.6
    again = [next(grouped.generate([5], 1, temperature=2.0, seed=seed)) for seed in range(20)]
    assert draws[:20] == again


def test_bits_per_byte(tiny):
    blind = dataclasses.replace(tiny, lm_head=np.zeros_like(tiny.lm_head))
    assert blind.bits_per_byte("any text", context=3) == pytest.approx(8)
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"^Llama.bits_per_byte\(\): context is"):
            blind.bits_per_byte("any text", context=bad)
    text = np.frombuffer(TEXT.encode(), np.uint8)[:25]
    bits = []
    for start in range(0, 25, 10):  # two whole windows and half a one
        window = text[start : start + 10]
        logits = tiny.forward([10, *window[:-1]]).astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        bits += [-math.log2(row[byte]) for row, byte in zip(chances, window, strict=True)]
    assert tiny.bits_per_byte(text, context=10) == pytest.approx(np.mean(bits), rel=1e-5)


def test_the_shipped_model_is_as_good_as_its_readme_says(tiny):
    """And better than a Markov model of order 3, fitted to the same training text."""
    table = (llama.TINY / "README.md").read_text(encoding="utf-8")
    quoted = {row[0]: float(row[1]) for row in re.findall(r"^\| (.+?) \| (\d\.\d+) \|$", table, re.MULTILINE)}
    bits = tiny.bits_per_byte((llama.TINY / "heldout.txt").read_bytes())
    assert bits == pytest.approx(quoted["this model, weights in bfloat16"], abs=2e-3)
    assert bits < quoted["Markov model of order 3"] - 0.1


def test_pooling_equal_heads_changes_nothing(grouped):
    """Two key/value heads made alike pool to one without loss."""
    layers = [
        dataclasses.replace(layer, k_proj=np.tile(layer.k_proj[:12], (2, 1)), v_proj=np.tile(layer.v_proj[:12], (2, 1)))
        for layer in grouped.layers
    ]
    alike = dataclasses.replace(grouped, layers=tuple(layers))
    pooled = alike.pooled(1)
    assert pooled.config.num_key_value_heads == 1
    assert pooled.num_parameters == alike.num_parameters - 2 * 2 * 12 * 40
    tokens = np.arange(20)
    np.testing.assert_allclose(pooled.forward(tokens), alike.forward(tokens), atol=2e-5)


def test_pooling_takes_the_mean_of_neighbours(tiny):
    old, new = tiny.layers[0].v_proj, tiny.pooled(2).layers[0].v_proj
    dim = tiny.config.head_dim
    want = old.astype(np.float64).reshape(2, 4, dim, -1).mean(axis=1).reshape(new.shape)
    np.testing.assert_array_equal(new, want.astype(np.float32))
    assert tiny.pooled(tiny.config.num_key_value_heads).layers[0].k_proj.tobytes() == tiny.layers[0].k_proj.tobytes()


def test_parameters_are_counted_once(grouped, tiny):
    assert grouped.num_parameters == sum(math.prod(shape) for shape in tensor_shapes(GROUPED).values())
    file = safetensors.SafetensorsFile(llama.TINY / "model.safetensors")
    assert tiny.num_parameters == sum(array.size for array in file.values())


def test_another_attention_can_be_put_in(tiny):
    shapes = []

    def spy(query, key, value, **rules):
        shapes.append((query.shape, key.shape))
        return tiny.attention(query, key, value, **rules)

    other = dataclasses.replace(tiny, attention=spy)
    other.forward(b"abc")
    heads, dim = tiny.config.num_attention_heads, tiny.config.head_dim
    assert shapes == [((1, heads, 3, dim), (1, heads, 3, dim))] * tiny.config.num_hidden_layers
    with pytest.raises(NotImplementedError, match="cache beside another attention"):
        other.forward(b"abc", other.new_cache(3))


@pytest.mark.parametrize("cache", [3, KVCache(1, 2, 12, capacity=4)])
def test_what_is_no_cache_of_a_model(grouped, cache):
    """One layer's cache is none either."""
    with pytest.raises(TypeError, match=r"^Llama.forward\(\): cache is .*; a KVCache a layer was wanted"):
        grouped.forward([1, 2], cache)


def test_full_cache(grouped):
    cache = grouped.new_cache(4)
    grouped.forward([1, 2, 3], cache)
    with pytest.raises(ValueError, match="5 tokens wanted, capacity is 4"):
        grouped.forward([1, 2], cache)
    assert [layer.lengths.tolist() for layer in cache] == [[3], [3]]  # no layer has taken anything
    with pytest.raises(ValueError, match=r"1 sequences.*of 2 were wanted"):
        grouped.forward([[1], [2]], cache)
    with pytest.raises(ValueError, match=r"1 layers.*2 layers"):
        grouped.forward([1], cache[:1])


@pytest.mark.parametrize("tokens", [[], [[]], 3, [1.0], [-1], [300], "text"], ids=repr)
def test_bad_tokens(grouped, tokens):
    with pytest.raises((ValueError, TypeError), match="tokens"):
        grouped.forward(tokens)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1, 2]], {}, r"shape \(1, 2\)"),
        ([1], {"temperature": -1.0}, "temperature is -1.0; a finite number of at least 0 was wanted: pass"),
        ([1], {"temperature": math.nan}, "temperature is nan; a finite"),
        ([1], {"temperature": math.inf}, "temperature is inf; a finite"),
        ([1], {"temperature": "hot"}, "temperature is 'hot', a str; a real number was wanted: pass temperature="),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; at least 1 was wanted: pass max_new_tokens=1 or more"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1; at least 1"),
        ([1], {"max_new_tokens": -5}, "max_new_tokens is -5; at least 1"),
        ([1], {"max_new_tokens": 1.5}, "max_new_tokens is 1.5, a float; an int"),
        ([1], {"seed": -1}, "seed is -1; at least 0"),
        ([1], {"max_new_tokens": 10**20}, "max_new_tokens is 10{20} behind 1 token; KVCache.*capacity is 10{19}1; "),
    ],
)
def test_what_generate_cannot_do(grouped, prompt, options, message):
    """And it says so at once, not with the first token."""
    with pytest.raises((ValueError, TypeError, MemoryError), match=rf"^Llama\.generate\(\): .*{message}"):
        grouped.generate(prompt, **{"max_new_tokens": 3, **options})


def test_defaults_and_newer_names(tmp_path):
    config = {key: GROUPED[key] for key in list(GROUPED)[:6]} | {"num_attention_heads": 5}
    shapes = config | {"num_key_value_heads": 5, "head_dim": 8}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "num_key_value_heads": None}
    got = llama.load(write_model(tmp_path, config, random_weights(shapes))).config
    assert (got.num_key_value_heads, got.head_dim, got.rope_theta, got.tie_word_embeddings) == (5, 8, 77.0, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, NotImplementedError, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, ValueError, r"k_proj\.bias is missing"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, NotImplementedError, "quantization_config"),
        ({"rope_scaling": {"type": "newest", "factor": 2.0}}, ValueError, "'newest'.*known are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, NotImplementedError, "layer type"),
        ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor is 0.5; only 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, NotImplementedError, "factor is 0.25; only 1.0"),
        ({"rope_scaling": [1]}, ValueError, r"rope_scaling is \[1\]; an object"),
        ({"layer_types": ["full_attention", "linear_attention"]}, NotImplementedError, "'linear_attention'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ValueError, "no sliding_window"),
        ({"layer_types": ["full_attention"]}, ValueError, "a list of 2"),
        ({"head_dim": "12"}, ValueError, "head_dim is '12'"),
        ({"num_key_value_heads": 4}, ValueError, "4, which does not divide num_attention_heads 6"),
        ({"model_type": "mistral", "sliding_window": 0}, ValueError, "sliding_window is 0"),
        ({"rms_norm_eps": "small"}, ValueError, "rms_norm_eps"),
        ({"hidden_size": None}, ValueError, "hidden_size"),
        ({"num_attention_heads": None}, ValueError, "num_attention_heads"),
        ({"num_hidden_layers": 3}, ValueError, r"model\.layers\.2\..* is missing.* and 4 more"),
        ({"num_hidden_layers": 1}, ValueError, r"model\.layers\.1\..* is not part of the model"),
        ({"vocab_size": 301}, ValueError, r"embed_tokens\.weight is \(300, 40\), wanted \(301, 40\)"),
    ],
)
def test_a_config_it_cannot_run(tmp_path, change, error, message):
    write_model(tmp_path, GROUPED | change, random_weights(GROUPED))
    with pytest.raises(error, match=f"(?s){tmp_path}.*{message}"):
        llama.load(tmp_path)


def test_files_it_cannot_read(tmp_path):
    weights = random_weights(GROUPED)
    name = "model.layers.0.self_attn.q_proj"
    for extra, message in [
        ({name + ".bias": np.zeros(72, np.float32)}, "bias is not part"),
        ({name + ".weight": np.zeros((72, 40), np.int8)}, "is I8"),
    ]:
        write_model(tmp_path, GROUPED, weights | extra)
        with pytest.raises(ValueError, match=message):
            llama.load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="no sound UTF-8 JSON"):
        llama.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    path = re.escape(str(tmp_path / "nowhere" / "config.json"))
    with pytest.raises(FileNotFoundError, match=rf"^load\(\): {path} does not exist; config.json and .*: pass the"):
        llama.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"^load\(\): {re.escape(str(tmp_path))} has neither model.safeten"):
        llama.load(tmp_path)
