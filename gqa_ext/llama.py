"""A Llama model that reads from top to bottom: NumPy multiplies the matrices, gqa_ext attends.

    tokens -> embedding -> layers x (norm, attention, norm, SwiGLU) -> norm -> logits

Llama and those that follow it closely: Mistral (sliding windows), Qwen2 (biases), Qwen3 (norms of queries and
keys). Weights come from a Hugging Face folder, which llama_files.py reads, are float32 and keep its layout,
(out, in). Arrays are (B, S, E) along the sequence and (B, H, S, D) in the heads.

Called by gqa_ext.demo, gqa_ext.generate and by users who want to see, change or evaluate a whole model.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._arguments import as_int, as_real
from ._messages import count, fail, kind
from .attention import scaled_dot_product_attention
from .cache import KVCache
from .convert.methods import pool_heads  # not from .convert, which evaluates models with this module
from .llama_files import Config, read_folder
from .rope import RotaryEmbedding

__all__ = ["TINY", "Config", "Layer", "Llama", "load"]

TINY = Path(__file__).parent / "tiny"  # the trained model in this package

Array = NDArray[Any]  # float32 wherever nothing else is said


# --- the arithmetic ---------------------------------------------------------------------------------------


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (..., in) times weight (out, in): one matrix product, where np.matmul makes one per leading index."""
    product: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], len(weight))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Each row of x (..., E) divided by its root mean square, times weight (E,). arXiv:1910.07467."""
    mean_square: Array = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


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
class Layer:
    """Weights of one layer, each (out, in); Q = heads * D, K = key/value heads * D, F = intermediate_size.

    None is what a model does not have: most have no biases, and only Qwen3 has norms of queries and keys.
    """

    input_layernorm: Array  # (E,)
    q_proj: Array  # (Q, E)
    k_proj: Array  # (K, E)
    v_proj: Array  # (K, E)
    o_proj: Array  # (E, Q)
    post_attention_layernorm: Array  # (E,)
    gate_proj: Array  # (F, E)
    up_proj: Array  # (F, E)
    down_proj: Array  # (E, F)
    q_bias: Array | None = None  # (Q,)
    k_bias: Array | None = None  # (K,)
    v_bias: Array | None = None  # (K,)
    o_bias: Array | None = None  # (E,)
    q_norm: Array | None = None  # (D,), of each head alike
    k_norm: Array | None = None  # (D,)

    @property
    def arrays(self) -> list[Array]:
        """Those that are there."""
        return [array for array in (getattr(self, field.name) for field in fields(self)) if array is not None]


@dataclass(frozen=True, repr=False)
class Llama:
    """A Llama-like model for inference in float32.

    Made by `load`. A frozen dataclass: `dataclasses.replace(model, attention=f)` gives the same model with
    another attention function, which works without a cache only; `model.pooled(2)` one with fewer key/value heads.

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

    def forward(self, tokens: ArrayLike | bytes | str, cache: Sequence[KVCache] | None = None) -> Array:
        """Logits of the token that follows each token.

        Parameters
        ----------
        tokens : array_like of int, shape (..., S), or bytes or str for a byte-level model
        cache : sequence of KVCache, optional
            As `new_cache` makes it. Holds what came before; the tokens are appended to it.

        Returns
        -------
        logits : array of float32, shape (..., S, vocab_size)

        Raises
        ------
        ValueError
            Tokens that are none, or that the cache has no room for; nothing has been appended then.
        TypeError
            Text, and a model whose tokens are not bytes.
        NotImplementedError
            A cache, and another attention function.
        """
        return linear(self.hidden_states(tokens, cache), self.lm_head)

    def hidden_states(self, tokens: ArrayLike | bytes | str, cache: Sequence[KVCache] | None = None) -> Array:
        """What `forward` multiplies with lm_head, (..., S, E): a long prompt needs the logits of its last row only."""
        tokens = self.encode(tokens)
        rows = tokens.reshape(-1, tokens.shape[-1])
        positions = None if cache is None else self._next_positions(rows, cache)
        caches = [None] * len(self.layers) if cache is None else cache
        eps = self.config.rms_norm_eps
        x = self.embed_tokens[rows]
        for index, layer in enumerate(self.layers):
            x = x + self._attend(index, rms_norm(x, layer.input_layernorm, eps), positions, caches[index])
            h = rms_norm(x, layer.post_attention_layernorm, eps)
            x = x + linear(silu(linear(h, layer.gate_proj)) * linear(h, layer.up_proj), layer.down_proj)
        return rms_norm(x, self.norm, eps).reshape(*tokens.shape, x.shape[-1])

    def _attend(self, index: int, x: Array, positions: NDArray[np.int64] | None, cache: KVCache | None) -> Array:
        """The attention block of one layer: x (B, S, E) to (B, S, E)."""
        layer = self.layers[index]
        query = self._heads(linear(x, layer.q_proj, layer.q_bias), layer.q_norm)
        key = self._heads(linear(x, layer.k_proj, layer.k_bias), layer.k_norm)
        value = self._heads(linear(x, layer.v_proj, layer.v_bias))
        query, key = self.rope(query, positions), self.rope(key, positions)
        if cache is None:
            window = self.window(index)
            out = self.attention(query, key, value, is_causal=True, window=window and (window - 1, None))
        else:
            cache.append(key, value)
            out = cache.attend(query)
        joined = out.swapaxes(-2, -3).reshape(*x.shape[:-1], layer.o_proj.shape[1])
        return linear(joined, layer.o_proj, layer.o_bias)

    def _heads(self, x: Array, norm: Array | None = None) -> Array:
        """(B, S, H * D) seen as (B, H, S, D), each head normalised where the model does that."""
        dim = self.config.head_dim
        heads = x.reshape(*x.shape[:-1], x.shape[-1] // dim, dim).swapaxes(-2, -3)
        return heads if norm is None else rms_norm(heads, norm, self.config.rms_norm_eps)

    @cached_property
    def rope(self) -> RotaryEmbedding:
        """What turns queries and keys."""
        return self.config.make_rope()

    def window(self, index: int) -> int | None:
        """How many keys, up to its own, a row of layer `index` sees; None is all."""
        return self.config.layer_windows[index] if self.config.layer_windows else None

    def new_cache(
        self, capacity: int, batch: tuple[int, ...] = (), dtype: DTypeLike = "float32"
    ) -> tuple[KVCache, ...]:
        """An empty cache for `capacity` tokens of `batch` sequences: a KVCache for each layer.

        A layer with a sliding window keeps no more keys than it will look at again. Other dtypes than float32 round
        what is kept: over 200 greedy steps of the shipped model, logits then move by less than 0.05 % (float16),
        0.3 % (bfloat16) and 1 % (int8) of the range of all of them, which can turn a near tie of two tokens.
        """
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        return tuple(
            KVCache(math.prod(batch), heads, dim, capacity=capacity, dtype=dtype, window=self.window(index))
            for index in range(len(self.layers))
        )

    def cache_for(self, prompt_tokens: int, max_new_tokens: int, dtype: DTypeLike = "float32") -> tuple[KVCache, ...]:
        """`new_cache` for one prompt and what follows it; MemoryError names max_new_tokens."""
        try:
            return self.new_cache(prompt_tokens + max_new_tokens, dtype=dtype)
        except MemoryError as error:
            came = f"max_new_tokens is {max_new_tokens} behind {count(prompt_tokens, 'token')}"
            fail(MemoryError, "Llama.generate", came, str(error))

    def _next_positions(self, tokens: NDArray[np.int64], cache: Sequence[KVCache]) -> NDArray[np.int64]:
        """Positions (B, S) of tokens behind those that a cache holds; ValueError where it has no room for them.

        A ring never gets full by itself, but one of `capacity` slots is sure to hold what any chunk needs only
        while all tokens together are no more. So every layer has the same limit, and all of them agree.
        """
        if self.attention is not scaled_dot_product_attention:
            raise NotImplementedError("Llama.forward(): cache beside another attention; leave out one of them")
        batch, size = tokens.shape
        if not isinstance(cache, Sequence):
            raise TypeError(f"Llama.forward(): cache is {kind(cache)}; a KVCache a layer was wanted: pass new_cache()")
        if len(cache) != len(self.layers) or cache[0].batch != batch:
            came = f"cache has {len(cache)} layers of {cache[0].batch if cache else 0} sequences"
            wanted = f"{len(self.layers)} layers of {batch} were wanted"
            raise ValueError(f"Llama.forward(): {came}; {wanted}: make it with new_cache()")
        lengths = cache[0].lengths
        stop, capacity = int(lengths.max(initial=0)) + size, cache[0].capacity
        if stop > capacity:
            came = f"{stop} tokens wanted, capacity is {capacity}"
            raise ValueError(f"Llama.forward(): cache: {came}; make a larger one with new_cache({stop})")
        positions: NDArray[np.int64] = lengths[:, None] + np.arange(size)
        return positions

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
        self,
        prompt: ArrayLike | bytes | str,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        kv_dtype: DTypeLike = "float32",
        cache: Sequence[KVCache] | None = None,
    ) -> Iterator[int]:
        """Continue a prompt, token by token, with a cache.

        Parameters
        ----------
        prompt : array_like of int, shape (S,), or bytes or str for a byte-level model
        max_new_tokens : int
            At least 1.
        temperature : float
            0 takes the likeliest token; otherwise the softmax of logits / temperature is sampled.
        seed : int
            Of the sampling, at least 0.
        kv_dtype : {'float32', 'float16', 'bfloat16', 'int8'}
            What keys and values are kept in; all else is float32.
        cache : sequence of KVCache, optional
            One sequence's, to go on from, in place of a new one of `kv_dtype`.

        Yields
        ------
        int
            The next token. For a byte-level model `bytes(model.generate(...))` is the text.

        Raises
        ------
        ValueError, TypeError
            At once, for an argument that is none of these; later, where `cache` has no room for a token.
        MemoryError
            There is no room for the keys and values of so many tokens.
        """
        tokens, call = self.encode(prompt), "Llama.generate"
        if tokens.ndim != 1:
            fail(ValueError, call, f"prompt has shape {tokens.shape}", "one sequence, (S,), was wanted", "pass one")
        most = as_int(call, "max_new_tokens", max_new_tokens, 1)
        fix = "pass temperature=0.0 for the likeliest token, or about 1.0 to sample"
        heat = as_real(call, "temperature", temperature, fix)
        if not 0 <= heat < math.inf:
            fail(ValueError, call, f"temperature is {heat}", "a finite number of at least 0 was wanted", fix)
        rng = np.random.default_rng(as_int(call, "seed", seed, 0))
        cache = self.cache_for(tokens.size, most, kv_dtype) if cache is None else cache
        return self._continue(tokens, most, heat, rng, cache)

    def _continue(
        self, tokens: Array, most: int, temperature: float, rng: np.random.Generator, cache: Sequence[KVCache]
    ) -> Iterator[int]:
        """What `generate` yields."""
        for _ in range(most):
            logits = linear(self.hidden_states(tokens, cache)[-1], self.lm_head)
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
        most = self.config.max_position_embeddings
        for windows in cut(tokens, most if context is None else as_int("Llama.bits_per_byte", "context", context, 1)):
            newlines = np.full((len(windows), 1), ord("\n"))
            logits = self.forward(np.concatenate([newlines, windows[:, :-1]], axis=1))
            likelihood = np.take_along_axis(log_softmax(logits), windows[..., None], axis=-1)
            bits -= float(likelihood.sum(dtype=np.float64)) / math.log(2)
        return bits / tokens.size

    def pooled(self, num_kv_heads: int, method: str = "mean") -> "Llama":
        """The same model with fewer key/value heads, each pooled from a group of neighbours. arXiv:2305.13245.

        k_norm is one for all heads, so it stays.
        """
        old = self.config.num_key_value_heads
        layers = []
        for layer in self.layers:
            given = {name: getattr(layer, name) for name in ("k_proj", "v_proj", "k_bias", "v_bias")}
            pooled = {
                name: pool_heads(array, old, num_kv_heads, method=method)
                for name, array in given.items()
                if array is not None
            }
            layers.append(replace(layer, **pooled))
        config = replace(self.config, num_key_value_heads=num_kv_heads)
        return replace(self, config=config, layers=tuple(layers))

    def __repr__(self) -> str:
        return f"<Llama, {self.num_parameters:,} parameters, {self.config}>"

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; tied embeddings count once."""
        arrays = [self.embed_tokens, self.norm, *(array for layer in self.layers for array in layer.arrays)]
        if self.lm_head is not self.embed_tokens:
            arrays.append(self.lm_head)
        return sum(array.size for array in arrays)


def load(folder: str | os.PathLike[str] = TINY) -> Llama:
    """Read a model from a Hugging Face folder.

    Parameters
    ----------
    folder : str or path-like
        Holds config.json (model_type "llama", "mistral", "qwen2" or "qwen3") and model.safetensors, or the shards
        that model.safetensors.index.json names, in float16, bfloat16, float32 or float64. The default is the small
        byte-level model shipped with this package.

    Returns
    -------
    Llama

    Raises
    ------
    FileNotFoundError
        config.json or a file of weights is missing; the message says which.
    NotImplementedError
        The config asks for something this forward pass lacks; the message names it.
    ValueError
        A file is broken, or its tensors are not those of the config.
    """
    config, weights = read_folder(Path(folder))
    layers = tuple(Layer(**arrays) for arrays in weights.layers)
    lm_head = weights.embed_tokens if weights.lm_head is None else weights.lm_head
    return Llama(config, weights.embed_tokens, layers, weights.norm, lm_head)
