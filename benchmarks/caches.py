"""What caches cost: `python benchmarks/caches.py [--quick] [--only NAME] [--markdown]`.

Each case times a call of one kind of cache against a peer over the same keys, or as many, interleaved in one run, and
holds the quotient under a ceiling. The peers of other houses are torch and ggml, where they are installed.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray
from timing import Bystanders, round_robin

import gqa_ext

Array = NDArray[Any]
Call = Callable[[int], object]
LENGTHS = np.array([4096, 3000, 1000, 2500, 3500, 700, 2048, 1800])


@dataclass(frozen=True)
class Case:
    """Builds the call and its peer; time / time is to stay under the ceiling."""

    name: str
    build: Callable[[np.random.Generator], tuple[Call, Call]]
    at_most: float


def _rows(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def _dense_cache(rng: np.random.Generator, dtype: str, lengths: Array) -> gqa_ext.KVCache:
    """32/8 heads of 128, filled."""
    cache = gqa_ext.KVCache(len(lengths), 8, 128, capacity=int(lengths.max()), dtype=dtype)
    for begin in range(0, int(lengths.max()), 256):
        new = _rows(rng, len(lengths), 8, 256, 128)
        cache.append(new, new, np.clip(lengths - begin, 0, 256))
    return cache


def _paged(rng: np.random.Generator, dtype: str) -> tuple[Call, Call]:
    """A ragged batch of 8 whose sequences grew side by side, in blocks of 16, against one KVCache."""
    dense = _dense_cache(rng, dtype, LENGTHS)
    paged = gqa_ext.PagedKVCache(2000, 16, 8, 128, dtype=dtype)
    ids = [paged.new_sequence() for _ in LENGTHS]
    for begin in range(0, int(LENGTHS.max()), 16):
        new = _rows(rng, len(ids), 8, 16, 128)
        paged.append(ids, new, new, np.clip(LENGTHS - begin, 0, 16))
    query = _rows(rng, len(ids), 32, 1, 128)
    return lambda i: paged.attend(ids, query), lambda i: dense.attend(query)


def _scattered(rng: np.random.Generator, dtype: str) -> tuple[Call, Call]:
    """The caller's blocks (N, Hkv, 16, D) in random order: no two of a head lie together."""
    dense = _dense_cache(rng, dtype, LENGTHS)
    table = rng.permutation(8 * 256).reshape(8, 256)
    stores = []
    for array in (dense.keys, dense.values):
        blocks = np.empty((8 * 256, 8, 16, 128), array.dtype)
        blocks[table.ravel()] = array.reshape(8, 8, 256, 16, 128).swapaxes(1, 2).reshape(-1, 8, 16, 128)
        stores.append(blocks)
    query = _rows(rng, 8, 32, 1, 128)
    return lambda i: gqa_ext.paged_attention(query, *stores, table, LENGTHS), lambda i: dense.attend(query)


def _ragged(rng: np.random.Generator) -> tuple[Call, Call]:
    """Time follows the tokens that are there, not the longest sequence: against one sequence of as many."""
    ragged, whole = _dense_cache(rng, "float32", LENGTHS), _dense_cache(rng, "float32", LENGTHS.sum(keepdims=True))
    queries = _rows(rng, 8, 32, 1, 128), _rows(rng, 1, 32, 1, 128)
    return lambda i: ragged.attend(queries[0]), lambda i: whole.attend(queries[1])


def _int8(rng: np.random.Generator) -> tuple[Call, Call]:
    lengths = np.array([16384])
    small, halves = _dense_cache(rng, "int8", lengths), _dense_cache(rng, "float16", lengths)
    query = _rows(rng, 1, 32, 1, 128)
    return lambda i: small.attend(query), lambda i: halves.attend(query)


def _int8_ggml(rng: np.random.Generator) -> tuple[Call, Call]:
    """Eight bits a number, 16k keys, 32/8 heads, against ggml's Q8_0."""
    import ggml_attention

    lengths = np.array([16384])
    small, query = _dense_cache(rng, "int8", lengths), _rows(rng, 1, 32, 1, 128)
    key, value = (_rows(rng, 1, 8, 16384, 128) for _ in range(2))
    theirs = ggml_attention.attention(query, key, value, gqa_ext.get_num_threads())
    return lambda i: small.attend(query), lambda i: theirs()


def _smallest(rng: np.random.Generator) -> tuple[Call, Call]:
    """append and attend of one token with one key, 8/2 heads, against torch's attention alone."""
    import torch

    torch.set_num_threads(1)
    key, query = _rows(rng, 1, 2, 1, 64), _rows(rng, 1, 8, 1, 64)
    caches = [gqa_ext.KVCache(1, 2, 64, capacity=1) for _ in range(2)]
    tensors = [torch.from_numpy(x) for x in (query, key, key)]

    def step(i: int) -> None:
        cache = caches[i % 2]
        cache.reset()
        cache.append(key, key)
        cache.attend(query)

    return step, lambda i: torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)


def _append(rng: np.random.Generator, dtype: str) -> tuple[Call, Call]:
    """2,048 tokens of 8 heads, as after a prompt, against torch's cast of as many into memory that is there."""
    import torch

    torch.set_num_threads(gqa_ext.get_num_threads())
    new = _rows(rng, 1, 8, 2048, 128)
    cache = gqa_ext.KVCache(1, 8, 128, capacity=2048, dtype=dtype)
    source, store = torch.from_numpy(new), torch.zeros(2, *new.shape, dtype=getattr(torch, dtype))

    def append(i: int) -> None:
        cache.reset()
        cache.append(new, new)

    def copy(i: int) -> None:
        for half in store:
            half.copy_(source)

    return append, copy


CASES = (
    Case("paged blocks of 16 / contiguous, 8 ragged, 32/8, float32", partial(_paged, dtype="float32"), 1.1),
    Case("paged blocks of 16 / contiguous, 8 ragged, 32/8, float16", partial(_paged, dtype="float16"), 1.1),
    Case("scattered blocks of 16 / contiguous, 8 ragged, 32/8, float32", partial(_scattered, dtype="float32"), 2),
    Case("8 ragged / one sequence of as many tokens, 32/8, float32", _ragged, 1.1),
    Case("int8 / float16, 16k, 32/8", _int8, 1.0),
    Case("int8 / ggml's Q8_0, 16k, 32/8", _int8_ggml, 1 / 3),
    Case("append 2,048 tokens to a float16 cache / torch's cast", partial(_append, dtype="float16"), 1.5),
    Case("append 2,048 tokens to a bfloat16 cache / torch's cast", partial(_append, dtype="bfloat16"), 1.5),
    Case("reset + append + attend, 1 key, 8/2 / torch attention alone", _smallest, 1.5),
)


def _growth(steps: int) -> float:
    """MiB that the process grows by in so many decode steps, beside the cache's own pages."""
    cache = gqa_ext.KVCache(1, 8, 128, capacity=steps + 100)
    new, query = np.ones((1, 8, 1, 128), np.float32), np.ones((1, 32, 1, 128), np.float32)
    cache.append(np.repeat(new, steps + 100, 2), np.repeat(new, steps + 100, 2))  # all pages are there
    cache.attend(query)
    cache.crop(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(steps):
        cache.append(new, new)
        cache.attend(query)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Measure, and print as it goes."""
    args = machine.cases("what the caches of gqa_ext cost, each against a peer over the same keys", CASES)
    gqa_ext.set_num_threads(args.threads)
    rounds = machine.rounds(args, usual=27)  # ceilings are closer than a median of nine can tell
    print(machine.describe(args.threads, ["gqa_ext"]), flush=True)
    bystanders = Bystanders()
    if args.markdown:
        print("\n| cache / peer | time | peer's time | quotient | ceiling |\n|" + "---|" * 5)
    for case in args.cases:
        try:
            call, peer = case.build(np.random.default_rng(0))
        except ImportError as error:
            skipped = f"| {case.name} | – | – | – | skipped: {error} |"
            print(skipped if args.markdown else f"\n{case.name}   skipped: {error}")
            continue
        times = round_robin({"call": call, "peer": peer}, rounds)
        cost = median(a / b for a, b in zip(times["call"], times["peer"], strict=True))
        verdict = "pass" if cost <= case.at_most else "FAIL"
        ours, theirs = (f"{median(times[name]) * 1e3:.3f} ms" for name in ("call", "peer"))
        if args.markdown:
            print(f"| {case.name} | {ours} | {theirs} | {cost:.2f} | ≤ {case.at_most:g}, {verdict} |", flush=True)
        else:
            print(f"\n{case.name}   {verdict}\n  {ours} / {theirs} = {cost:.2f} (ceiling {case.at_most:g})", flush=True)
    if not args.only:
        print(f"\n10,000 decode steps: {_growth(10_000):.1f} MiB more")
    bystanders.report(rounds)


if __name__ == "__main__":
    main()
