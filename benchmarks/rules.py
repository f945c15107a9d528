"""What the rules cost: `python benchmarks/rules.py [--quick] [--only NAME] [--markdown]`.

Each case times one of our calls with a rule and one without, interleaved in one run over the same arrays, and holds
the quotient of their times under a ceiling. Where a rule leaves less to do, the quotient is also divided by the share
of query-key pairs that it leaves, so that 1 means: time proportional to live work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray
from timing import Bystanders, round_robin

import gqa_ext
from gqa_ext import scaled_dot_product_attention as attention

Array = NDArray[Any]
Call = Callable[[int], object]


@dataclass(frozen=True)
class Pair:
    """A call with the rule, one without, and the live share of the second's work that the first has left."""

    ruled: Call
    plain: Call
    share: float = 1.0


@dataclass(frozen=True)
class Case:
    """A pair to build, and the ceiling of time / time / share."""

    name: str
    build: Callable[[np.random.Generator], Pair]
    at_most: float


@dataclass(frozen=True)
class Outcome:
    """One case, measured: medians in seconds a call, and the median over rounds of time / time / share."""

    case: Case
    ruled: float
    plain: float
    share: float
    cost: float

    @property
    def verdict(self) -> str:
        return "pass" if self.cost <= self.case.at_most else "FAIL"


def _arrays(
    rng: np.random.Generator, seq: int = 2048, batch: int = 1, num_heads: int = 32, num_kv_heads: int = 8
) -> list[Array]:
    """Query, key and value of float32, head_dim 128."""
    shapes = [(batch, heads, seq, 128) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _causal(rng: np.random.Generator) -> Pair:
    qkv = _arrays(rng)
    return Pair(lambda i: attention(*qkv, is_causal=True), lambda i: attention(*qkv))


def _window(rng: np.random.Generator) -> Pair:
    seq, left = 8192, 511
    qkv = _arrays(rng, seq, num_heads=8, num_kv_heads=2)
    live = sum(min(i, left) + 1 for i in range(seq)) / (seq * (seq + 1) // 2)
    return Pair(
        lambda i: attention(*qkv, is_causal=True, window=(left, None)), lambda i: attention(*qkv, is_causal=True), live
    )


def _every_bias(rng: np.random.Generator) -> Pair:
    qkv = _arrays(rng)
    mask = rng.standard_normal((2048, 2048), np.float32)
    slopes, sinks = gqa_ext.get_alibi_slopes(32), rng.standard_normal(32, np.float32)
    return Pair(
        lambda i: attention(*qkv, mask, is_causal=True, softcap=30.0, alibi_slopes=slopes, sinks=sinks),
        lambda i: attention(*qkv, is_causal=True),
    )


def _ragged(rng: np.random.Generator) -> Pair:
    batch, seq = 8, 2048
    qkv = _arrays(rng, seq, batch, 8, 2)
    lengths = rng.integers(1, seq + 1, batch)
    live = float(np.sum(lengths**2)) / (batch * seq**2)
    return Pair(lambda i: attention(*qkv, query_lengths=lengths, kv_lengths=lengths), lambda i: attention(*qkv), live)


def _bool_mask(rng: np.random.Generator, batch: int, seq: int) -> Pair:
    """One slot in ten is masked at random: no tile is wholly live, none wholly dead."""
    qkv = _arrays(rng, seq, batch)
    mask = rng.random((batch, 1, seq, seq)) < 0.9
    return Pair(lambda i: attention(*qkv, mask), lambda i: attention(*qkv))


def _packed(rng: np.random.Generator) -> Pair:
    """Sixteen sequences of 1 to 512 tokens, packed; the plain side calls attention once for each."""
    lengths = rng.integers(1, 513, 16)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    query, key, value = (rng.standard_normal((int(ends[-1]), heads, 128), np.float32) for heads in (32, 8, 8))
    singles = [
        [np.ascontiguousarray(x[begin:end].swapaxes(0, 1)[None]) for x in (query, key, value)]
        for begin, end in itertools.pairwise(ends)
    ]
    return Pair(
        lambda i: gqa_ext.varlen_attention(query, key, value, ends, ends, is_causal=True),
        lambda i: [attention(*qkv, is_causal=True) for qkv in singles],
    )


CASES = (
    Case("causal / not causal, 2048, 32/8", _causal, 0.6),
    Case("window of 512 / causal, 8192, 8/2, a live pair", _window, 1.25),
    Case("softcap + float mask + ALiBi + sinks, causal / causal, 2048, 32/8", _every_bias, 1.5),
    Case("ragged / full, 8 x 2048, 8/2, a live pair", _ragged, 1.2),
    Case("bool mask (B, 1, Sq, Sk) / plain, 1 x 2048, 32/8", partial(_bool_mask, batch=1, seq=2048), 1.15),
    Case("bool mask (B, 1, Sq, Sk) / plain, 4 x 1024, 32/8", partial(_bool_mask, batch=4, seq=1024), 1.15),
    Case("varlen / one by one, 16 sequences up to 512, 32/8, causal", _packed, 1.05),
)


def _measure(case: Case, rounds: int) -> Outcome:
    pair = case.build(np.random.default_rng(0))
    times = round_robin({"ruled": pair.ruled, "plain": pair.plain}, rounds)
    quotients = [ruled / plain for ruled, plain in zip(times["ruled"], times["plain"], strict=True)]
    return Outcome(case, median(times["ruled"]), median(times["plain"]), pair.share, median(quotients) / pair.share)


def _text(outcome: Outcome) -> str:
    times = f"{outcome.ruled * 1e3:9.2f} ms / {outcome.plain * 1e3:9.2f} ms"
    share = f" / {outcome.share:.4f} of the pairs" if outcome.share != 1 else ""
    cost = f"{outcome.cost:.2f} (ceiling {outcome.case.at_most:.2f})"
    return f"{outcome.case.name}   {outcome.verdict}\n  {times}{share} = {cost}"


def _markdown(outcomes: Iterable[Outcome]) -> str:
    lines = ["| with a rule / without | time | time without | share of pairs | cost | ceiling |", "|" + "---|" * 6]
    for outcome in outcomes:
        times = f"{outcome.ruled * 1e3:.1f} ms | {outcome.plain * 1e3:.1f} ms"
        cost = f"{outcome.cost:.2f} | ≤ {outcome.case.at_most:g}, {outcome.verdict}"
        lines.append(f"| {outcome.case.name} | {times} | {outcome.share:.3g} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print as it goes."""
    args = machine.cases("what the rules of gqa_ext cost, each against the same call without it", CASES)
    gqa_ext.set_num_threads(args.threads)
    print(machine.describe(args.threads, ["gqa_ext"]), flush=True)
    bystanders = Bystanders()
    outcomes = []
    for case in args.cases:
        outcomes.append(_measure(case, machine.rounds(args)))
        if not args.markdown:
            print(f"\n{_text(outcomes[-1])}", flush=True)
    if args.markdown:
        print(f"\n{_markdown(outcomes)}")
    bystanders.report(machine.rounds(args))


if __name__ == "__main__":
    main()
