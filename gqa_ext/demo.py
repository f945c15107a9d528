"""What grouped-query attention saves and what it costs, measured on this machine with the shipped model.

For every number of key/value heads the multi-head model can be pooled to: parameters, bytes a token takes
in the cache, time to decode a token at a long context, bits per byte on held-out text. Then a text that
the model writes, and how far our attention is from plain float64 NumPy on the model's own activations.

Called by `gqa-ext demo`; `run` does the same in a notebook.
"""

import itertools
import math
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from . import cpu_info, kv_cache_nbytes
from .llama import TINY, Llama, load

__all__ = ["NOTEBOOK", "Report", "Row", "run"]

NUM_KEYS = 32_768  # keys in the cache while decoding is timed
ROUNDS = 25  # timings of each variant; the median counts
WINDOWS = 32  # of the held-out text, evenly spread over it, read by each variant
ORACLE_BYTES = 512  # of the same text, compared with float64
PROMPT = "HOPE, n.  "
NEW_BYTES = 320
TEMPERATURE = 0.7  # the likeliest byte every time soon runs in circles

NOTEBOOK = """\
from gqa_ext import demo, llama
model = llama.load()
print(demo.run(model))
"""


@dataclass(frozen=True)
class Row:
    """One number of key/value heads and what was measured with it.

    Attributes
    ----------
    num_kv_heads, parameters : int
    kv_bytes : int
        Bytes a token takes in a float32 cache, all layers.
    decode_ms : float
        Milliseconds for one token of the whole model behind a long context, median.
    bits_per_byte : float
        On the held-out text.
    """

    num_kv_heads: int
    parameters: int
    kv_bytes: int
    decode_ms: float
    bits_per_byte: float


@dataclass(frozen=True)
class Report:
    """All that `run` measured; print it.

    Attributes
    ----------
    title : str
    num_heads : int
        Query heads.
    rows : tuple of Row
        From MHA to MQA.
    prompt, text : str
        What the model was given, and what it wrote.
    largest_error : float
        Largest absolute difference from the float64 oracle, on the model's own activations.
    numpy_error : float
        The same for NumPy in float32.
    largest_output : float
        Largest absolute output among those compared.
    num_keys : int
        Keys in the cache while decoding was timed.
    num_bytes : int
        Bytes of held-out text that were read.
    """

    title: str
    num_heads: int
    rows: tuple[Row, ...]
    prompt: str
    text: str
    largest_error: float
    numpy_error: float
    largest_output: float
    num_keys: int
    num_bytes: int

    def __str__(self) -> str:
        return "\n".join([*textwrap.wrap(self.title, 80), "", self._table(), "", self._sample(), "", self._accuracy()])

    def _table(self) -> str:
        lines = [
            "                     parameters   KV bytes       decode   bits per",
            "key/value heads                   per token    per token       byte",
            "-" * 68,
        ]
        for row in self.rows:
            name = {self.num_heads: "MHA", 1: "MQA"}.get(row.num_kv_heads, "GQA")
            lines.append(
                f"{row.num_kv_heads:>3}  {name}, {self.num_heads // row.num_kv_heads:>2} to one"
                f"{row.parameters:>14,}{row.kv_bytes:>12,}{row.decode_ms:>10.2f} ms{row.bits_per_byte:>11.3f}"
            )
        note = (
            f"Decode: the whole model, one token, float32, {self.num_keys:,} keys in the cache; median of {ROUNDS}. "
            f"Bits per byte: {self.num_bytes:,} bytes the model was not trained on; heads pooled by their mean, "
            "no training afterwards."
        )
        return "\n".join([*lines, *textwrap.wrap(note, 80)])

    def _sample(self) -> str:
        lines = [line for part in (self.prompt + self.text).splitlines() for line in textwrap.wrap(part, 76) or [""]]
        return "\n".join([f"The MHA model continues {self.prompt!r}:", "", *(f"  {line}".rstrip() for line in lines)])

    def _accuracy(self) -> str:
        return (
            f"Largest difference from float64 NumPy on the model's own activations: {self.largest_error:.1e}\n"
            f"(that of float32 NumPy: {self.numpy_error:.1e}; the outputs reach {self.largest_output:.1f})"
        )


def oracle(query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Causal attention of the last rows, softmax(Q K^T / sqrt(D)) V, in `dtype` and nothing but NumPy.

    Query is (..., Hq, Sq, D), key and value are (..., Hkv, Sk, D); the last query row sees every key.
    """
    group = query.shape[-3] // key.shape[-3]
    key, value = (np.repeat(x.astype(dtype), group, axis=-3) for x in (key, value))
    scores = query.astype(dtype) @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    rows, keys = scores.shape[-2:]
    scores[..., ~np.tri(rows, keys, keys - rows, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: NDArray[Any] = weights / weights.sum(axis=-1, keepdims=True) @ value
    return result


def compare_with_oracle(model: Llama, text: bytes) -> tuple[float, float, float]:
    """Largest difference from the oracle of our attention and of float32 NumPy, and largest output, in any layer."""
    found = []

    def checked(query: NDArray[Any], key: NDArray[Any], value: NDArray[Any], **rules: Any) -> NDArray[Any]:
        out: NDArray[Any] = model.attention(query, key, value, **rules)
        wanted = oracle(query, key, value)
        plain = oracle(query, key, value, np.float32)
        found.append([np.abs(out - wanted).max(), np.abs(plain - wanted).max(), np.abs(wanted).max()])
        return out

    replace(model, attention=checked).forward(text)
    error, numpy_error, output = np.max(found, axis=0).tolist()
    return error, numpy_error, output


def decode_times(models: Sequence[Llama], num_keys: int) -> list[float]:
    """Median milliseconds in which each model decodes one token behind `num_keys` random keys and values.

    The models take turns, so that whatever else the machine does meets them all; a first round is not timed.
    """
    rng = np.random.default_rng(0)
    caches = [model.new_cache(num_keys + 1) for model in models]
    for cache in itertools.chain.from_iterable(caches):
        cache.append(*rng.random((2, 1, cache.num_kv_heads, num_keys, cache.head_dim), dtype=np.float32))
    times: list[list[float]] = [[] for _ in models]
    for _ in tqdm(range(ROUNDS + 1), desc="decoding", disable=None, leave=False):
        for model, layers, measured in zip(models, caches, times, strict=True):
            for cache in layers:
                cache.crop(num_keys)
            start = time.perf_counter()
            model.forward([0], layers)
            measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(measured[1:]) for measured in times]


def sample(text: bytes, size: int) -> bytes:
    """WINDOWS pieces of ``size`` bytes, evenly spread over the text."""
    starts = np.linspace(0, max(0, len(text) - size), WINDOWS).astype(int)
    return b"".join(text[start : start + size] for start in starts)


def run(model: Llama | None = None, text: bytes | None = None, *, num_keys: int = NUM_KEYS) -> Report:
    """Pool a byte-level model to every possible number of key/value heads and measure each.

    Parameters
    ----------
    model : Llama, optional
        Default: the one shipped with this package.
    text : bytes, optional
        Text the model was not trained on. Default: WINDOWS pieces from all over the shipped model's.
    num_keys : int
        Length of the context at which decoding is timed.

    Returns
    -------
    Report

    Examples
    --------
    >>> from gqa_ext import demo
    >>> report = demo.run()
    >>> [row.num_kv_heads for row in report.rows]
    [8, 4, 2, 1]
    """
    model = load() if model is None else model
    config = model.config
    text = sample((TINY / "heldout.txt").read_bytes(), config.max_position_embeddings) if text is None else text
    heads = config.num_key_value_heads
    models = [model.pooled(count) for count in range(heads, 0, -1) if heads % count == 0]
    times = decode_times(models, num_keys)
    rows = [
        Row(
            num_kv_heads=pooled.config.num_key_value_heads,
            parameters=pooled.num_parameters,
            kv_bytes=kv_cache_nbytes(
                1, 1, pooled.config.num_key_value_heads, config.head_dim,
                num_layers=config.num_hidden_layers, dtype="float32",
            ),
            decode_ms=decode_ms,
            bits_per_byte=pooled.bits_per_byte(text),
        )
        for pooled, decode_ms in tqdm(list(zip(models, times, strict=True)), desc="reading", disable=None, leave=False)
    ]  # fmt: skip
    continued = model.generate(PROMPT, NEW_BYTES, temperature=TEMPERATURE)
    written = tqdm(continued, total=NEW_BYTES, desc="writing", disable=None, leave=False)
    cpu = cpu_info()
    title = (
        f"A Llama of {config.num_hidden_layers} layers with {config.num_attention_heads} query heads of "
        f"{config.head_dim}, on {cpu['model'] or cpu['machine']}, {cpu['isa']}, {cpu['num_threads']} threads"
    )
    continuation = bytes(written).decode("ascii", "backslashreplace")
    accuracy = compare_with_oracle(model, text[:ORACLE_BYTES])
    return Report(title, config.num_attention_heads, tuple(rows), PROMPT, continuation, *accuracy, num_keys, len(text))
