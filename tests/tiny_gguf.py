"""Writes GGUF files of a tiny random model with the `gguf` package; used by test_gguf.py."""

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason='pip install "gqa-ext[gguf]"')
tokenizers = pytest.importorskip("tokenizers", reason='pip install "gqa-ext[gguf]"')

# 256 is a block of the K types; one merge chain of digits shows where a text is cut, "zz" has no merge
E, F, HEADS, KV_HEADS, D, LAYERS = 256, 512, 4, 2, 64, 2
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
CONTROL = ["<|end|>", "<|start|>"]
TOKENS = [*CONTROL, *BYTES, "12", "123", "1234", "he", "zz"]
MERGES = ["1 2", "12 3", "123 4", "h e"]
TYPES = gguf.GGMLQuantizationType
HUGGING_FACE = {  # GGUF's name of a layer's tensor: Hugging Face's, shape
    "attn_norm": ("input_layernorm", (E,)),
    "attn_q": ("self_attn.q_proj", (HEADS * D, E)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * D, E)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * D, E)),
    "attn_output": ("self_attn.o_proj", (E, HEADS * D)),
    "ffn_norm": ("post_attention_layernorm", (E,)),
    "ffn_gate": ("mlp.gate_proj", (F, E)),
    "ffn_up": ("mlp.up_proj", (F, E)),
    "ffn_down": ("mlp.down_proj", (E, F)),
}
METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 77,
    "llama.embedding_length": E,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 0.03125,
    "llama.rope.freq_base": 500.0,
    "llama.rope.dimension_count": D,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
}


def names(tied: bool = True) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF's name of every tensor: Hugging Face's, shape."""
    found = {
        "token_embd": ("model.embed_tokens.weight", (len(TOKENS), E)),
        "output_norm": ("model.norm.weight", (E,)),
    }
    if not tied:
        found["output"] = ("lm_head.weight", (len(TOKENS), E))
    for index in range(LAYERS):
        for name, (other, shape) in HUGGING_FACE.items():
            found[f"blk.{index}.{name}"] = (f"model.layers.{index}.{other}.weight", shape)
    return {f"{name}.weight": pair for name, pair in found.items()}


def random_weights(tied: bool = True) -> dict[str, np.ndarray]:
    """Weights by GGUF's names, in Hugging Face's order of rows."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, (_, shape) in names(tied).items()
    }


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """As convert_hf_to_gguf.py of llama.cpp has it."""
    split = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, weights: dict[str, np.ndarray], kind: int = TYPES.F32, changes: dict | None = None) -> Path:
    """A file of the model, its matrices as `kind`; changes: metadata to be other, or None for absent."""
    metadata = METADATA | (changes or {})
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in metadata.items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, weight in weights.items():
        heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k" in name else None
        laid = weight if heads is None else permute(weight, heads)
        its_kind = kind if weight.ndim == 2 else TYPES.F32
        writer.add_tensor(name, quantize(laid, its_kind), raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(weight: np.ndarray, kind: int) -> np.ndarray:
    """By gguf; for the types that it only reads, random blocks whose float16 scales are small."""
    scales = {TYPES.Q4_K: [0, 2], TYPES.Q6_K: [208]}.get(kind)
    if scales is None:
        return gguf.quantize(weight, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(weight.size).integers(0, 256, (weight.size // block, size), np.uint8)
    for start in scales:
        raw[:, start : start + 2] = np.array([1e-4], np.float16).view(np.uint8)
    return raw.reshape(len(weight), -1)
