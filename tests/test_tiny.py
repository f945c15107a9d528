"""The shipped model's files: sizes, names and shapes, an honest split, and the numbers its README quotes.

The split can only be checked where Debian's dict-devil and dict-jargon are installed, the model's bits per byte only
where torch is; both are said when skipped. How gqa_ext itself runs the model is tested with gqa_ext.llama.
"""

import importlib
import json
import re
from importlib.resources import as_file, files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(scope="module")
def tiny():
    """The installed folder gqa_ext/tiny."""
    with as_file(files("gqa_ext") / "tiny") as folder:
        yield folder


@pytest.fixture
def tool(monkeypatch):
    """A function that imports one of the scripts in tools/ by name."""
    if not TOOLS.is_dir():
        pytest.skip("tools/ is not beside tests/ (a source distribution without it)")
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


@pytest.fixture
def texts(tool):
    """(training text, held-out text) as the training script splits them."""
    text = tool("tiny_text")
    if not all(path.exists() for path in text.DICTIONARIES):
        pytest.skip("the texts are missing: apt-get install dict-devil dict-jargon")
    return text.split_texts(text.DICTIONARIES)


def read_header(path):
    """The JSON header of a safetensors file and the offset of its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def expected_shapes(config):
    """Tensor names and shapes of a tied-embedding Llama of this configuration."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "self_attn.q_proj": [query, hidden],
        "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden],
        "self_attn.o_proj": [hidden, query],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in layers for name, shape in block.items()}
    ends = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    return shapes | ends


def quoted(tiny, what):
    """The bits per byte that the README's table gives for one row."""
    found = re.search(rf"^\| {re.escape(what)} \| (\d\.\d+) \|$", (tiny / "README.md").read_text("utf-8"), re.M)
    assert found, f"README.md quotes no number for {what!r}"
    return float(found[1])


def test_sizes(tiny):
    assert (tiny / "model.safetensors").stat().st_size <= 2_000_000
    assert 100_000 <= (tiny / "heldout.txt").stat().st_size <= 200_000


def test_config_is_a_byte_level_mha_llama(tiny):
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 256
    assert config["num_attention_heads"] == config["num_key_value_heads"] >= 8
    assert config["tie_word_embeddings"]


def test_tensors_match_the_config(tiny):
    header, _ = read_header(tiny / "model.safetensors")
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {name: entry["shape"] for name, entry in tensors.items()} == expected_shapes(config)
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}


def test_weights_are_finite_and_trained(tiny):
    header, start = read_header(tiny / "model.safetensors")
    data = (tiny / "model.safetensors").read_bytes()
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            weight = np.frombuffer(data[start + low : start + high], ml_dtypes.bfloat16).astype(np.float32)
            assert np.isfinite(weight).all(), name
            assert weight.std() > 0, name


def test_held_out_text_is_the_split_of_the_script(tiny, texts):
    _, held_out = texts
    assert (tiny / "heldout.txt").read_bytes().decode("utf-8") == held_out


def test_nothing_held_out_was_trained_on(tool, texts):
    train, _ = texts
    text = tool("tiny_text")
    for path in text.DICTIONARIES:
        for article in text.read_articles(path)[text.HELD_OUT_EVERY - 1 :: text.HELD_OUT_EVERY]:
            assert f"\n\n{article}\n\n" not in train


def test_quoted_markov_number(tiny, tool, texts):
    text = tool("tiny_text")
    train, held_out = map(text.as_bytes, texts)
    assert text.best_markov_bits(train, held_out, 3) == pytest.approx(quoted(tiny, "Markov model of order 3"), abs=1e-3)


def test_quoted_model_number(tiny, tool):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    network, script = tool("tiny_llama"), tool("train_tiny")
    config = json.loads((tiny / "config.json").read_text("utf-8"))
    model = network.Llama(network.Config(**{name: config[name] for name in network.Config.__dataclass_fields__}))
    weights = load_file(tiny / "model.safetensors")
    model.load_state_dict({name: weight.to(torch.float32) for name, weight in weights.items()})
    held_out = np.frombuffer((tiny / "heldout.txt").read_bytes(), np.uint8)
    window = config["max_position_embeddings"]
    fifth = held_out[: len(held_out) // window * window].reshape(-1, window)[::5]  # all of it takes ten seconds
    measured = script.bits_per_byte(model, fifth.ravel())
    assert measured == pytest.approx(quoted(tiny, "this model, weights in bfloat16"), abs=0.05)
    assert measured < quoted(tiny, "Markov model of order 3") - 0.3


def test_markov_probabilities_sum_to_one(tool):
    text = tool("tiny_text")
    train = text.as_bytes("\nabracadabra\nabra\n")
    bits = [text.markov_bits(train, np.array([byte], np.uint8), 3, 0.6) for byte in range(256)]
    assert np.exp2(-np.array(bits)).sum() == pytest.approx(1.0, abs=1e-12)


def test_markov_prefers_what_it_has_seen(tool):
    text = tool("tiny_text")
    train = text.as_bytes("\nabracadabra" * 20)
    seen, unseen = text.as_bytes("\nabracadabra"), text.as_bytes("\nzyxwvutsrqp")
    assert text.markov_bits(train, seen, 3, 0.6) < 2 < text.markov_bits(train, unseen, 3, 0.6)


def test_tidy_unwraps_prose_and_keeps_verse(tool):
    text = tool("tiny_text")
    verse = "RUIN, v.  To destroy\nutterly.\n\n    One line,\n    another.\n                 Bierce\n"
    assert text.tidy(verse) == "RUIN, v.  To destroy utterly.\n\n    One line,\n    another.\n    Bierce"
    entry = "zork\n /zork/, n.\n\n    A game; see {\n    grue}. “Yes”.\n\n        code\n"
    assert text.tidy(entry) == 'zork\n /zork/, n.\n\nA game; see {grue}. "Yes".\n\n    code'
