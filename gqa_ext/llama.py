"""A Llama model that reads from top to bottom: NumPy multiplies the matrices, gqa_ext attends.

    tokens -> embedding -> layers x (norm, attention, norm, SwiGLU) -> norm -> logits

Weights come from a Hugging Face folder (config.json, model.safetensors), are widened to float32 and keep
its layout, (out, in). Plain RoPE, no biases; anything else in a config is refused by name. Arrays are
(..., S, E) along the sequence and (..., H, S, D) in the heads, with any leading batch dimensions.

Called by gqa_ext.demo and by users who want to see, change or evaluate a whole model.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import scaled_dot_product_attention
from .convert.methods import pool_heads  # not from .convert, which evaluates models with this module
from .convert.safetensors import SafetensorsFile

__all__ = ["TINY", "Cache", "Config", "Layer", "Llama", "load"]

TINY = Path(__file__).parent / "tiny"  # the trained model in this package

Array = NDArray[Any]  # float32 wherever nothing else is said


# --- the arithmetic ---------------------------------------------------------------------------------------


def linear(x: Array, weight: Array) -> Array:
    """x (..., in) times weight (out, in): one matrix product, where np.matmul makes one per leading index."""
    product: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    return product.reshape(*x.shape[:-1], -1)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Each row of x (..., E) divided by its root mean square, times weight (E,). arXiv:1910.07467."""
    mean_square: Array = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def rope_angles(positions: NDArray[np.int64], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine, each (S, head_dim / 2), by which RoPE turns positions (S,). arXiv:2104.09864."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None] * frequencies  # float64, so that late positions stay exact
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair (x[i], x[i + D/2]) of x (..., S, D): Llama's half-rotated RoPE."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def silu(x: Array) -> Array:
    """x * sigmoid(x); the sigmoid by way of tanh, which cannot overflow."""
    sigmoid: Array = 0.5 + 0.5 * np.tanh(0.5 * x)
    return x * sigmoid


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax along the last axis."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    total: Array = np.exp(shifted).sum(axis=-1, keepdims=True)
    return shifted - np.log(total)


def cut(tokens: NDArray[np.int64], size: int, batch: int = 4) -> Iterator[NDArray[np.int64]]:
    """The windows of `size` tokens, up to `batch` at a time as (batch, size); what is left over last, (1, rest)."""
    whole = tokens.size - tokens.size % size
    for start in range(0, whole, batch * size):
        yield tokens[start : min(start + batch * size, whole)].reshape(-1, size)
    if whole < tokens.size:
        yield tokens[None, whole:]


# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Shape of a Llama model; names and defaults are those of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, each (out, in); Q = heads * D, K = key/value heads * D, F = intermediate_size."""

    input_layernorm: Array  # (E,)
    q_proj: Array  # (Q, E)
    k_proj: Array  # (K, E)
    v_proj: Array  # (K, E)
    o_proj: Array  # (E, Q)
    post_attention_layernorm: Array  # (E,)
    gate_proj: Array  # (F, E)
    up_proj: Array  # (F, E)
    down_proj: Array  # (E, F)


@dataclass
class Cache:
    """Keys and values of the tokens a model has seen, filled from the left; what lies past `length` is not read."""

    keys: Array  # (layers, ..., key/value heads, capacity, D)
    values: Array  # the same
    length: int = 0

    def append(self, index: int, key: Array, value: Array) -> tuple[Array, Array]:
        """Store new rows (..., H, S, D) of layer `index`; return all rows up to them, as views."""
        stop = self.length + key.shape[-2]
        if stop > self.keys.shape[-2]:
            raise ValueError(f"Cache: {stop} tokens wanted, capacity is {self.keys.shape[-2]}; make a larger cache")
        for store, new in (self.keys, key), (self.values, value):
            store[index][..., self.length : stop, :] = new
        return self.keys[index][..., :stop, :], self.values[index][..., :stop, :]


@dataclass(frozen=True, repr=False)
class Llama:
    """A Llama model for inference in float32.

    Made by `load`. A frozen dataclass: `dataclasses.replace(model, attention=f)` gives the same model with
    another attention function, `model.pooled(2)` one with fewer key/value heads.

    Examples
    --------
    >>> from gqa_ext import llama
    >>> model = llama.load()
    >>> model.forward(b"The dictionary").shape
    (14, 256)
    >>> model.pooled(1).config.num_key_value_heads
    1
    """

    config: Config
    embed_tokens: Array  # (vocabulary, E)
    layers: tuple[Layer, ...]
    norm: Array  # (E,)
    lm_head: Array  # (vocabulary, E); the very array embed_tokens where the two are tied
    attention: Callable[..., Any] = scaled_dot_product_attention

    def forward(self, tokens: ArrayLike | bytes | str, cache: Cache | None = None) -> Array:
        """Logits of the token that follows each token.

        Parameters
        ----------
        tokens : array_like of int, shape (..., S), or bytes or str for a byte-level model
        cache : Cache, optional
            Holds what came before; the tokens are appended to it.

        Returns
        -------
        logits : array of float32, shape (..., S, vocab_size)
        """
        tokens = self.encode(tokens)
        start = 0 if cache is None else cache.length
        positions = np.arange(start, start + tokens.shape[-1])
        angles = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        eps = self.config.rms_norm_eps
        x = self.embed_tokens[tokens]
        for index, layer in enumerate(self.layers):
            x = x + self._attend(index, rms_norm(x, layer.input_layernorm, eps), angles, cache)
            h = rms_norm(x, layer.post_attention_layernorm, eps)
            x = x + linear(silu(linear(h, layer.gate_proj)) * linear(h, layer.up_proj), layer.down_proj)
        if cache is not None:
            cache.length += len(positions)
        return linear(rms_norm(x, self.norm, eps), self.lm_head)

    def _attend(self, index: int, x: Array, angles: tuple[Array, Array], cache: Cache | None) -> Array:
        """The attention block of one layer: x (..., S, E) to (..., S, E)."""
        layer = self.layers[index]
        query = rotate(self._heads(linear(x, layer.q_proj)), *angles)
        key = rotate(self._heads(linear(x, layer.k_proj)), *angles)
        value = self._heads(linear(x, layer.v_proj))
        if cache is not None:
            key, value = cache.append(index, key, value)
        out: Array = self.attention(query, key, value, is_causal=True, causal_alignment="lower_right")
        return linear(out.swapaxes(-2, -3).reshape(*x.shape[:-1], -1), layer.o_proj)

    def _heads(self, x: Array) -> Array:
        """(..., S, H * D) seen as (..., H, S, D)."""
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim).swapaxes(-2, -3)

    def new_cache(self, capacity: int, batch: tuple[int, ...] = ()) -> Cache:
        """An empty cache for `capacity` tokens of `batch` sequences."""
        config = self.config
        shape = (config.num_hidden_layers, *batch, config.num_key_value_heads, capacity, config.head_dim)
        return Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def encode(self, tokens: ArrayLike | bytes | str) -> NDArray[np.int64]:
        """Tokens as an array; text as its UTF-8 bytes, where the vocabulary is the 256 bytes."""
        if isinstance(tokens, bytes | str):
            if self.config.vocab_size != 256:
                raise TypeError(
                    f"Llama: tokens is {type(tokens).__name__} but the model has {self.config.vocab_size} tokens, "
                    "not the 256 bytes; give token numbers"
                )
            tokens = np.frombuffer(tokens.encode() if isinstance(tokens, str) else tokens, np.uint8)
        array = np.asarray(tokens)
        if array.ndim == 0 or array.shape[-1] == 0 or array.dtype.kind not in "iu":
            raise ValueError(f"Llama: tokens is {array.dtype}{array.shape}; wanted one integer or more along (..., S)")
        if array.size and not 0 <= array.min() <= array.max() < self.config.vocab_size:
            raise ValueError(f"Llama: tokens has {array.min()}..{array.max()}; wanted 0..{self.config.vocab_size - 1}")
        return array.astype(np.int64)

    def generate(
        self, prompt: ArrayLike | bytes | str, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[int]:
        """Continue a prompt, token by token, with a cache.

        Parameters
        ----------
        prompt : array_like of int, shape (S,), or bytes or str for a byte-level model
        max_new_tokens : int
        temperature : float
            0 takes the likeliest token; otherwise the softmax of logits / temperature is sampled.
        seed : int

        Yields
        ------
        int
            The next token. For a byte-level model `bytes(model.generate(...))` is the text.
        """
        tokens = self.encode(prompt)
        rng = np.random.default_rng(seed)
        cache = self.new_cache(tokens.size + max_new_tokens)
        for _ in range(max_new_tokens):
            logits = self.forward(tokens, cache)[-1]
            # the argmax of logits + Gumbel noise is a sample of their softmax
            noise = temperature * rng.gumbel(size=logits.size) if temperature else 0.0
            token = int(np.argmax(logits + noise))
            yield token
            tokens = np.array([token])

    def bits_per_byte(self, text: ArrayLike | bytes | str, *, context: int | None = None) -> float:
        """Bits a byte-level model needs for each byte of a text.

        The text is cut into windows of `context` bytes (default: max_position_embeddings); a window knows
        nothing of the one before it, its first byte is predicted from a newline.
        """
        tokens = self.encode(text)
        bits = 0.0
        for windows in cut(tokens, context or self.config.max_position_embeddings):
            newlines = np.full((len(windows), 1), ord("\n"))
            logits = self.forward(np.concatenate([newlines, windows[:, :-1]], axis=1))
            likelihood = np.take_along_axis(log_softmax(logits), windows[..., None], axis=-1)
            bits -= float(likelihood.sum(dtype=np.float64)) / math.log(2)
        return bits / tokens.size

    def pooled(self, num_kv_heads: int, method: str = "mean") -> "Llama":
        """The same model with fewer key/value heads, each pooled from a group of neighbours. arXiv:2305.13245."""
        config = replace(self.config, num_key_value_heads=num_kv_heads)
        layers = []
        for layer in self.layers:
            k_proj, v_proj = (
                pool_heads(weight, self.config.num_key_value_heads, num_kv_heads, method=method)
                for weight in (layer.k_proj, layer.v_proj)
            )
            layers.append(replace(layer, k_proj=k_proj, v_proj=v_proj))
        return replace(self, config=config, layers=tuple(layers))

    def __repr__(self) -> str:
        return f"<Llama, {self.num_parameters:,} parameters, {self.config}>"

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; tied embeddings count once."""
        arrays = [self.embed_tokens, self.norm]
        arrays += [getattr(layer, field.name) for layer in self.layers for field in fields(layer)]
        if self.lm_head is not self.embed_tokens:
            arrays.append(self.lm_head)
        return sum(array.size for array in arrays)


# --- the files --------------------------------------------------------------------------------------------

_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
_ONE_FILE, _SHARDED = "model.safetensors", "model.safetensors.index.json"


def load(folder: str | os.PathLike[str] = TINY) -> Llama:
    """Read a model from a Hugging Face folder.

    Parameters
    ----------
    folder : str or path-like
        Holds config.json (model_type "llama") and model.safetensors in float16, bfloat16, float32 or
        float64. The default is the small byte-level model shipped with this package.

    Returns
    -------
    Llama

    Raises
    ------
    FileNotFoundError
        config.json or model.safetensors is missing.
    NotImplementedError
        The config asks for something this forward pass lacks; the message names it.
    ValueError
        A file is broken, or its tensors are not those of the config.
    """
    path = Path(folder)
    config = _read_config(path / "config.json")
    if not (path / _ONE_FILE).exists() and (path / _SHARDED).exists():
        raise NotImplementedError(f"load(): {path}: the weights are in several files; only {_ONE_FILE} is implemented")
    file = SafetensorsFile(path / _ONE_FILE)
    shapes = _shapes(config)
    _check_tensors(file, shapes)
    weights = {name: np.asarray(file[name], dtype=np.float32) for name in shapes}
    layers = [
        Layer(*(weights[_layer_name(index, field.name)] for field in fields(Layer)))
        for index in range(config.num_hidden_layers)
    ]
    embed_tokens = weights["model.embed_tokens.weight"]
    lm_head = weights.get("lm_head.weight", embed_tokens)
    return Llama(config, embed_tokens, tuple(layers), weights["model.norm.weight"], lm_head)


def _read_config(path: Path) -> Config:
    given = json.loads(path.read_text(encoding="utf-8"))
    for key, wanted in _FIXED.items():
        if given.get(key, wanted) != wanted:
            raise NotImplementedError(f"load(): {path}: {key} is {given[key]!r}; only {wanted!r} is implemented")
    rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})  # old and new name
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise NotImplementedError(f"load(): {path}: rope scaling {rope!r}; only plain RoPE is implemented")
    known = {field.name: given[field.name] for field in fields(Config) if given.get(field.name) is not None}
    try:
        heads = known["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": known["hidden_size"] // heads}
        return Config(**(derived | {key: rope[key] for key in rope.keys() & {"rope_theta"}} | known))
    except (KeyError, TypeError) as error:
        raise ValueError(f"load(): {path}: {error} is missing; is it a model's config.json?") from None


def _layer_name(index: int, field: str) -> str:
    """Hugging Face's name of a Layer field."""
    block = "" if field.endswith("layernorm") else "self_attn." if field[0] in "qkvo" else "mlp."
    return f"model.layers.{index}.{block}{field}.weight"


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs."""
    e, f = config.hidden_size, config.intermediate_size
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = ((e,), (q, e), (k, e), (k, e), (e, q), (e,), (f, e), (f, e), (e, f))  # as in Layer
    shapes: dict[str, tuple[int, ...]]
    shapes = {"model.embed_tokens.weight": (config.vocab_size, e), "model.norm.weight": (e,)}
    for index in range(config.num_hidden_layers):
        shapes |= {_layer_name(index, field.name): shape for field, shape in zip(fields(Layer), layer, strict=True)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, e)
    return shapes


def _check_tensors(file: SafetensorsFile, shapes: dict[str, tuple[int, ...]]) -> None:
    """All that is wrong with a file's tensors, in one message."""
    faults = [f"{name} is missing" for name in shapes.keys() - file.tensors.keys()]
    spare = {"lm_head.weight"}  # some writers store tied embeddings twice
    for name, info in file.tensors.items():
        if name not in shapes and name not in spare and not name.endswith("rotary_emb.inv_freq"):
            faults.append(f"{name} is not part of the model")
        elif info.shape != shapes.get(name, info.shape):
            faults.append(f"{name} is {info.shape}, wanted {shapes[name]}")
        elif info.dtype not in ("F16", "BF16", "F32", "F64"):
            faults.append(f"{name} is {info.dtype}, wanted F16, BF16, F32 or F64")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"load(): {file.path}: {'; '.join(sorted(faults)[:5])}{more}; does config.json belong to it?")
