"""Tiny checkpoints for the converter's tests, written by the safetensors library and plain Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gqa_ext.convert.safetensors import SafetensorsFile

HEADS, HEAD_DIM, HIDDEN = 8, 4, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 3,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-05,
    "vocab_size": 64,
}


def llama(layers: int = 3, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a Llama, by name."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (64, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{n}_proj.weight": (HEADS * HEAD_DIM, HIDDEN) for n in "qkv"}
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (48, HIDDEN)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_config(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    text = json.dumps({key: value for key, value in config.items() if value != "absent"}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def write_model(folder: Path, shards: int = 1, dtype: Any = np.float32, layers: int = 3, **config: Any) -> Path:
    """A model folder with `shards` files of weights, a tokenizer, a licence and other people's weights."""
    write_config(folder, num_hidden_layers=layers, **config)
    tensors = llama(layers, dtype)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map, total = {}, sum(array.nbytes for array in tensors.values())
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, {"format": "pt", "shard": str(i)})
            weight_map |= dict.fromkeys(part, file)
        parameters = sum(array.size for array in tensors.values())
        metadata = {"total_parameters": parameters, "total_size": total}
        index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index + "\n")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "LICENSE").write_text("do what you want\n")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: array for file in files for name, array in file.items()}


def is_kv(name: str) -> bool:
    return "k_proj" in name or "v_proj" in name
