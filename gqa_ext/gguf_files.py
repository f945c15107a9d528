"""Llama models from GGUF files, llama.cpp's format: one file holds weights, config and tokenizer.

Weights are widened to float32, whatever they are stored in (four bytes a parameter: 540 MB for 135 million).
The `gguf` package does it, so every quantisation that it knows can be read. llama.cpp orders the rows of
each query and key head for its interleaved rotary embedding; here they are put back for the half-rotated one
of Hugging Face and gqa_ext.llama.

Called by gqa_ext.generate, and by users. Needs the packages `gguf` and `tokenizers`: pip install "gqa-ext[gguf]".
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ._gguf_header import Placed, read_header
from ._gguf_tokens import GGUFTokenizer, import_extra
from .llama import Config, Layer, Llama

__all__ = ["load"]

Array = NDArray[Any]

# GGUF's names of Layer's fields, after "blk.N." and before ".weight"
_LAYER = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_EMBEDDING, _NORM, _HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
_FACTORS = "rope_freqs.weight"  # by which Llama 3.1 and later divide each frequency


def load(path: str | os.PathLike[str]) -> tuple[Llama, GGUFTokenizer]:
    """Read a model and its tokenizer from a GGUF file.

    Parameters
    ----------
    path : str or path-like
        A file of architecture "llama" (Llama, SmolLM, ...) with a byte-level BPE vocabulary, its tensors in
        F32, F16, BF16 or a quantised type that the `gguf` package knows (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, ...).

    Returns
    -------
    model : Llama
        In float32: four bytes a parameter.
    tokenizer : GGUFTokenizer
        `encode(text)`, `decode(tokens)`, `eos`.

    Raises
    ------
    ImportError
        `gguf` or `tokenizers` is not installed; the message has the command.
    OSError
        The file is not there or cannot be opened.
    NotImplementedError
        The file asks for something that gqa_ext.llama lacks; the message names it.
    ValueError
        The file is broken; the message names it and, where it is one tensor, the tensor.

    Notes
    -----
    Names, metadata keys and the order of rows are llama.cpp's (gguf-py/gguf/constants.py,
    conversion of LlamaForCausalLM).

    Examples
    --------
    >>> from gqa_ext import gguf_files
    >>> model, tokenizer = gguf_files.load("smollm2.gguf")  # doctest: +SKIP
    >>> tokenizer.decode(list(model.generate(tokenizer.encode("The capital of France is"), 2)))  # doctest: +SKIP
    ' Paris.'
    """
    if not Path(path).exists():
        wanted = "the path of a GGUF file was wanted, as llama.cpp's converter writes it"
        raise FileNotFoundError(f"gguf_files.load(): {path} does not exist; {wanted}: pass one")
    with open(path, "rb") as file:
        gguf = import_extra("gguf")
        try:
            metadata, placed = read_header(file)
            config = _config(metadata, placed)
            tokenizer = GGUFTokenizer.from_metadata(metadata, config.vocab_size)
            shapes = _shapes(config, _FACTORS in placed)
            _check_tensors(placed, shapes)
            weights = {name: _read(gguf, file, name, placed[name]) for name in shapes}
            config = replace(config, rope_scaling=_rope_scaling(metadata, config, weights.get(_FACTORS)))
            config.make_rope()  # refuses factors that are none
        except NotImplementedError as error:
            raise NotImplementedError(f"gguf_files.load(): {Path(path)}: {error}") from None
        except ValueError as error:
            raise ValueError(f"gguf_files.load(): {Path(path)}: {error}") from None
    return _model(config, weights), tokenizer


# --- the config -------------------------------------------------------------------------------------------


# keys that change the result where they are anything else
_PLAIN = {
    "split.count": 0,
    "llama.expert_count": 0,
    "llama.rope.scale_linear": 1.0,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.attention.causal": True,
}


def _config(metadata: dict[str, Any], placed: dict[str, Placed]) -> Config:
    """The config that metadata and tensors give; what gqa_ext.llama cannot compute is refused."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise NotImplementedError(f"general.architecture is {architecture!r:.80}; only 'llama' is implemented")
    plain: Any
    for key, plain in _PLAIN.items():
        if metadata.get(key, plain) != plain:
            raise NotImplementedError(f"{key} is {metadata[key]!r:.80}; only {plain!r} is implemented")
    hidden, heads = _number(metadata, "embedding_length"), _number(metadata, "attention.head_count")
    head_dim = _number(metadata, "attention.key_length", hidden // heads)
    for key in "rope.dimension_count", "attention.value_length":
        if _number(metadata, key, head_dim) != head_dim:
            raise NotImplementedError(f"llama.{key} is {metadata[f'llama.{key}']}; only the head's {head_dim} will do")
    layers = _number(metadata, "block_count")
    if layers > len(placed) or head_dim % 2:  # so that no number of layers is believed that the file cannot have
        raise ValueError(f"{layers} layers in {len(placed)} tensors, heads of {head_dim}; the metadata are broken")
    kv_heads = _number(metadata, "attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads, {kv_heads} key/value heads; the first is to be a multiple")
    return Config(
        vocab_size=placed[_EMBEDDING].shape[0] if _EMBEDDING in placed and placed[_EMBEDDING].shape else 0,
        hidden_size=hidden,
        intermediate_size=_number(metadata, "feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_number(metadata, "context_length"),
        rms_norm_eps=_number(metadata, "attention.layer_norm_rms_epsilon", kind=float),
        rope_theta=_number(metadata, "rope.freq_base", 10000.0, kind=float),
        tie_word_embeddings=_HEAD not in placed,
    )


def _rope_scaling(metadata: dict[str, Any], config: Config, factors: Array | None) -> dict[str, Any] | None:
    """Hugging Face's rope dict, or None for plain RoPE."""
    scaling = metadata.get("llama.rope.scaling.type", "linear")  # as llama.cpp has it, with no factor for 1
    if scaling == "linear" and metadata.get("llama.rope.scaling.factor", 0.0) in (0, 1):
        scaling = "none"
    if scaling not in ("none", "linear") or (scaling == "linear" and factors is not None):
        beside = " beside rope_freqs" if factors is not None else ""
        raise NotImplementedError(f"llama.rope.scaling.type is {scaling!r:.80}{beside}; known: none, linear")
    if scaling == "linear":
        return {"rope_type": "linear", "factor": _number(metadata, "rope.scaling.factor", kind=float)}
    if factors is None:
        return None
    return {  # longrope is the dict that has a factor for each frequency; here one table serves every length
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _number(metadata: dict[str, Any], key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
    """A number above zero of the llama section."""
    value = metadata.get(f"llama.{key}", default)
    if isinstance(value, list) and key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        raise NotImplementedError(f"llama.{key} differs by layer; one number for all layers is implemented")
    if type(value) is not kind or not 0 < value < math.inf:
        came = "missing" if value is None else f"{value!r:.80}"
        raise ValueError(f"llama.{key} is {came}; wanted is {'an integer' if kind is int else 'a float'} above zero")
    return value


# --- the tensors ------------------------------------------------------------------------------------------


def _layer_name(index: int, field: str) -> str:
    """GGUF's name of a Layer field."""
    return f"blk.{index}.{_LAYER[field]}.weight"


def _shapes(config: Config, has_factors: bool) -> dict[str, tuple[int, ...]]:
    """GGUF's name and the shape of every tensor the model needs."""
    e, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = ((e,), (q, e), (k, e), (k, e), (e, q), (e,), (f, e), (f, e), (e, f))  # as in _LAYER
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, e), _NORM: (e,)}
    for index in range(config.num_hidden_layers):
        shapes |= {_layer_name(index, field): shape for field, shape in zip(_LAYER, layer, strict=True)}
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, e)
    if has_factors:
        shapes[_FACTORS] = (config.head_dim // 2,)
    return shapes


def _check_tensors(placed: dict[str, Placed], shapes: dict[str, tuple[int, ...]]) -> None:
    """All that is wrong with names and shapes, in one message."""
    spare = [name for name in placed if name not in shapes]
    if spare:  # biases, norms of queries and keys, experts
        raise NotImplementedError(f"tensor {spare[0]!r:.80} is none that gqa_ext.llama computes with")
    faults = [f"tensor {name} is missing" for name in shapes if name not in placed]
    for name, tensor in placed.items():
        if tensor.shape != shapes[name]:
            faults.append(f"tensor {name} is {tensor.shape}, wanted {shapes[name]}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{'; '.join(faults[:5])}{more}")


def _read(gguf: ModuleType, file: BinaryIO, name: str, tensor: Placed) -> Array:
    """A tensor, widened to float32."""
    *rows, columns = tensor.shape
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise ValueError(f"tensor {name}: type {tensor.kind} is unknown to gguf") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"tensor {name}: rows of {columns} are not whole blocks of {kind.name}, which hold {block}")
    shape = (*rows, columns // block * size)
    nbytes, end = math.prod(shape), os.fstat(file.fileno()).st_size
    if tensor.offset + nbytes > end:
        raise ValueError(f"tensor {name}: bytes {tensor.offset}..{tensor.offset + nbytes} of {end}; it is cut short")
    file.seek(tensor.offset)
    raw = np.fromfile(file, np.uint8, nbytes).reshape(shape)
    try:
        with np.errstate(all="ignore"):  # scales may be anything in a broken file
            weight: Array = gguf.dequantize(raw, kind)
    except NotImplementedError:
        raise NotImplementedError(f"tensor {name} is {kind.name}, which gguf cannot widen to float32") from None
    if not np.isfinite(weight).all():
        raise ValueError(f"tensor {name} has infinities or NaN; the file is broken")
    return weight


def _model(config: Config, weights: dict[str, Array]) -> Llama:
    layers = []
    for index in range(config.num_hidden_layers):
        layer = {field: weights[_layer_name(index, field)] for field in _LAYER}
        for field, heads in ("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads):
            layer[field] = halves_from_pairs(layer[field], heads)
        layers.append(Layer(**layer))
    embedding = weights[_EMBEDDING]
    return Llama(config, embedding, tuple(layers), weights[_NORM], weights.get(_HEAD, embedding))


def halves_from_pairs(weight: Array, heads: int) -> Array:
    """Rows (heads * D, E), of which each head's turn in pairs (2i, 2i + 1), put so that (i, i + D/2) turn."""
    rows = weight.reshape(heads, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
