"""MHA, GQA and MQA on this machine: what each number of key/value heads costs, and what it loses.

One table is of an attention layer as large as a real model's, the other of the shipped model, which also has a text to
be measured by. Called by ``gqa-ext bench``; `run` does the same in a notebook.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from . import KVCache, cpu_info, kv_cache_nbytes, scaled_dot_product_attention
from ._figures import figure_class
from .demo import sample
from .llama import TINY, load

__all__ = ["LayerRow", "ModelRow", "Result", "Sizes", "run"]

DTYPE = "float16"  # of the caches


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are a layer of Llama 2 7B's size.

    Attributes
    ----------
    num_heads, head_dim, embed_dim : int
    prefill : int
        Tokens attended to at once, causal, float32.
    contexts : tuple of int
        Tokens in the cache while one more is decoded, rising.
    rounds : int
        The median over so many counts.
    """

    num_heads: int = 32
    head_dim: int = 128
    embed_dim: int = 4096
    prefill: int = 2048
    contexts: tuple[int, ...] = (4096, 32_768)
    rounds: int = 9


@dataclass(frozen=True)
class LayerRow:
    """One number of key/value heads in a large layer.

    Attributes
    ----------
    num_kv_heads, parameters : int
        Numbers in the four projections, without biases.
    kv_bytes : int
        Of one token in the layer's cache.
    prefill_ms : float
        The attention call alone.
    decode_us : tuple of float
        Microseconds of one token's attention behind each context.
    """

    num_kv_heads: int
    parameters: int
    kv_bytes: int
    prefill_ms: float
    decode_us: tuple[float, ...]


@dataclass(frozen=True)
class ModelRow:
    """The shipped model with its heads pooled to so many: numbers in all, bytes of a token, bits for a byte of text."""

    num_kv_heads: int
    parameters: int
    kv_bytes: int
    bits_per_byte: float


@dataclass(frozen=True)
class Result:
    """All that `run` measured; print it, `markdown` or `plot` it."""

    machine: str
    sizes: Sizes
    layer: tuple[LayerRow, ...]
    model_heads: int
    model: tuple[ModelRow, ...]

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, heads and cells of both tables."""
        sizes = self.sizes
        first = (
            f"A layer of {sizes.num_heads} query heads of {sizes.head_dim}, {sizes.embed_dim} wide; {DTYPE} cache, "
            f"float32 prefill of {sizes.prefill:,} tokens; attention only, medians, {self.machine}"
        )
        heads = ["key/value heads", "parameters", f"KV bytes per token ({DTYPE})", "prefill"]
        heads += [f"decode at {context:,}" for context in sizes.contexts]
        cells = [
            [_name(row.num_kv_heads, sizes.num_heads), f"{row.parameters:,}", f"{row.kv_bytes:,}",
             f"{row.prefill_ms:.1f} ms", *(f"{time:,.0f} us" for time in row.decode_us)]
            for row in self.layer
        ]  # fmt: skip
        second = "The shipped model, heads pooled by their mean, no training afterwards; text it was not trained on"
        rows = [
            [_name(row.num_kv_heads, self.model_heads), f"{row.parameters:,}", f"{row.kv_bytes:,}",
             f"{row.bits_per_byte:.3f}"]
            for row in self.model
        ]  # fmt: skip
        return [(first, heads, cells), (second, [*heads[:3], "bits per byte"], rows)]

    def __str__(self) -> str:
        lines = []
        for title, heads, cells in self._tables():
            widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
            lines += [title, ""]
            for row in (heads, *cells):
                lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
            lines.append("")
        return "\n".join(lines[:-1])

    def markdown(self) -> str:
        """The tables for a README."""
        lines = []
        for title, heads, cells in self._tables():
            lines += [f"{title}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in cells]
            lines.append("")
        return "\n".join(lines[:-1])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw cache bytes, decoding times and bits per byte over the number of key/value heads.

        Parameters
        ----------
        path : str or path-like
            .svg, .png or whatever matplotlib writes.

        Raises
        ------
        ImportError
            There is no matplotlib: ``pip install "gqa-ext[plot]"``.
        """
        figure = figure_class("Result.plot")(figsize=(10, 3.2), layout="constrained")
        axes = figure.subplots(1, 3)
        shown = [row.num_kv_heads for row in self.layer]
        axes[0].plot(shown, [row.kv_bytes / 1024 for row in self.layer], "o-", color="#0072b2")
        axes[0].set(ylabel="KV cache, KiB per token and layer")
        for i, (context, mark) in enumerate(zip(self.sizes.contexts, "os^v", strict=False)):
            times = [row.decode_us[i] / 1000 for row in self.layer]
            axes[1].plot(shown, times, f"{mark}-", label=f"{context:,} tokens", color=("#0072b2", "#d55e00")[i % 2])
        axes[1].set(ylabel="decoding a token, ms per layer")
        axes[1].legend(title="context", frameon=False)
        counts = [row.num_kv_heads for row in self.model]
        axes[2].plot(counts, [row.bits_per_byte for row in self.model], "o-", color="#0072b2")
        axes[2].set(ylabel="bits per byte, shipped model")
        for axis in axes[:2]:
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        for axis, ticks in zip(axes, (shown, shown, counts), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_xlabel("key/value heads")
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def run(sizes: Sizes | None = None) -> Result:
    """Measure; takes about half a minute.

    Parameters
    ----------
    sizes : Sizes, optional

    Returns
    -------
    Result

    Examples
    --------
    >>> from gqa_ext import bench
    >>> small = bench.Sizes(num_heads=4, head_dim=16, embed_dim=64, prefill=32, contexts=(64, 128), rounds=1)
    >>> [row.num_kv_heads for row in bench.run(small).layer]
    [4, 2, 1]
    """
    sizes = Sizes() if sizes is None else sizes
    counts = [count for count in range(sizes.num_heads, 0, -1) if sizes.num_heads % count == 0]
    prefill, decode = _prefill_times(sizes, counts), _decode_times(sizes, counts)
    layer = tuple(
        LayerRow(
            count, 2 * sizes.embed_dim * sizes.head_dim * (sizes.num_heads + count),
            kv_cache_nbytes(1, 1, count, sizes.head_dim, dtype=DTYPE), 1e3 * prefill[i],
            tuple(1e6 * seconds for seconds in decode[i]),
        )
        for i, count in enumerate(counts)
    )  # fmt: skip
    cpu = cpu_info()
    machine = f"{cpu['model'] or cpu['machine']}, {cpu['isa']}, {cpu['num_threads']} threads"
    return Result(machine, sizes, layer, *_shipped_model())


def _medians(calls: list[Callable[[], Any]], rounds: int, title: str) -> list[float]:
    """Median seconds of each call; they take turns, and a first round is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in tqdm(range(rounds + 1), desc=title, disable=None, leave=False):
        for call, measured in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured[1:]) for measured in times]


def _random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _prefill_times(sizes: Sizes, counts: list[int]) -> list[float]:
    query = _random(1, sizes.num_heads, sizes.prefill, sizes.head_dim)

    def call(count: int) -> Callable[[], Any]:
        keys = _random(1, count, sizes.prefill, sizes.head_dim)
        return lambda: scaled_dot_product_attention(query, keys, keys, is_causal=True)

    return _medians([call(count) for count in counts], sizes.rounds, "prefill")


def _decode_times(sizes: Sizes, counts: list[int]) -> list[list[float]]:
    """For each number of heads, seconds behind each context; the caches grow from one to the next."""
    query = _random(1, sizes.num_heads, 1, sizes.head_dim)
    caches = [KVCache(1, count, sizes.head_dim, capacity=max(sizes.contexts), dtype=DTYPE) for count in counts]
    times: list[list[float]] = [[] for _ in counts]
    for context in sizes.contexts:
        for cache in caches:
            while (length := int(cache.lengths[0])) < context:
                rows = _random(1, cache.num_kv_heads, min(1024, context - length), sizes.head_dim)
                cache.append(rows, rows)
        calls: list[Callable[[], Any]] = [lambda cache=cache: cache.attend(query) for cache in caches]  # type: ignore[misc]
        for row, seconds in zip(times, _medians(calls, 3 * sizes.rounds, f"decoding at {context:,}"), strict=True):
            row.append(seconds)
    return times


def _shipped_model() -> tuple[int, tuple[ModelRow, ...]]:
    """Its number of query heads, and a row for each number of key/value heads."""
    model = load()
    config = model.config
    text = sample((TINY / "heldout.txt").read_bytes(), config.max_position_embeddings)
    rows = []
    counts = [count for count in range(config.num_key_value_heads, 0, -1) if config.num_key_value_heads % count == 0]
    for count in tqdm(counts, desc="reading", disable=None, leave=False):
        pooled = model.pooled(count)
        kv_bytes = kv_cache_nbytes(1, 1, count, config.head_dim, num_layers=config.num_hidden_layers, dtype=DTYPE)
        rows.append(ModelRow(count, pooled.num_parameters, kv_bytes, pooled.bits_per_byte(text)))
    return config.num_attention_heads, tuple(rows)


def _name(num_kv_heads: int, num_heads: int) -> str:
    kind = {num_heads: "MHA", 1: "MQA"}.get(num_kv_heads, "GQA")
    return f"{num_kv_heads} ({kind})"
