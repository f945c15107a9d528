"""What attention.py prints: one block a work for a terminal, or one row a work in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from works import GEMM, GGML, NUMPY, OPENVINO, ORT, OURS, READ, TORCH, WIDEST, WORKS, Work


@dataclass(frozen=True)
class Measured:
    """Times of one contender, in seconds a call, one a round."""

    times: list[float]
    amount: int
    note: str

    @property
    def rate(self) -> float:
        """FLOP or bytes a second, from the median time."""
        return self.amount / median(self.times)


@dataclass(frozen=True)
class Result:
    """One work, measured."""

    work: Work
    measured: dict[str, Measured]
    absent: dict[str, str]

    def ratio(self, name: str) -> float | None:
        """Our rate over that of `name`: the median over rounds of the ratio within a round."""
        ours, other = self.measured.get(OURS), self.measured.get(name)
        if ours is None or other is None:
            return None
        pairs = zip(ours.times, other.times, strict=True)
        return median(theirs / mine for mine, theirs in pairs) * ours.amount / other.amount

    def met(self) -> bool | None:
        """Whether the floors are met; None if a contender they need is absent. ggml is none of those."""
        verdicts = []
        for name, floor in self.work.floors.items():
            if name == GGML and name in self.absent:
                continue
            ratio = self.ratio(name)
            if ratio is None:
                return None
            verdicts.append(ratio >= floor)
        return any(verdicts) if self.work.any_floor else all(verdicts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _rate(work: Work, value: float) -> str:
    return f"{value / 1e9:.1f} G{work.unit}/s" if work.seq_k > 1 else ""


def _verdict(met: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: "not measured"}[met]


def text(result: Result) -> str:
    """A block of lines for a terminal."""
    work = result.work
    lines = [f"{work.name}   {_verdict(result.met())}{', one floor is enough' if work.any_floor else ''}"]
    for name, measured in result.measured.items():
        ratio, floor = result.ratio(name), work.floors.get(name)
        line = f"  {name:<20} {_time(median(measured.times)):>10} {_rate(work, measured.rate):>14}"
        line += f"  {ratio:5.2f}x" if ratio is not None and name != OURS else " " * 8
        line += f" (floor {floor:.2f})" if floor is not None else " " * 13
        lines.append(f"{line}  {measured.note}".rstrip())
    lines += [f"  {name:<20} absent: {reason}" for name, reason in result.absent.items()]
    return "\n".join(lines)


def _cell(result: Result, names: Iterable[str]) -> str:
    """`1.52 (≥ 1.3)` for those in `names` that took part; the rarer ones are named."""
    parts = []
    for name in names:
        ratio = result.ratio(name)
        if ratio is not None:
            floor = result.work.floors.get(name)
            label = "" if name in (GEMM, TORCH, ORT, NUMPY) else f"{name} "
            parts.append(f"{label}{ratio:.2f}" + ("" if floor is None else f" (≥ {floor:.2g})"))
    return "; ".join(parts) or "–"


def markdown(results: Iterable[Result]) -> str:
    """A table for the README: our time and rate, then our speed over each contender's."""
    lines = [
        "| work | time | rate | × NumPy gemm, or what is named | × torch | × ONNX Runtime, or what is named | × NumPy "
        "| floors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours = result.measured.get(OURS)
        cells = [result.work.name]
        cells += [_time(median(ours.times)), _rate(result.work, ours.rate)] if ours else ["–", "–"]
        cells += [_cell(result, names) for names in ((GEMM, READ, WIDEST), (TORCH,), (ORT, OPENVINO, GGML), (NUMPY,))]
        cells.append(_verdict(result.met()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_json(result: Result) -> dict[str, object]:
    """Plain data, for a result measured in another process."""
    measured = {name: [m.times, m.amount, m.note] for name, m in result.measured.items()}
    return {"work": result.work.name, "measured": measured, "absent": result.absent}


def from_json(data: dict[str, Any]) -> Result:
    """The inverse of to_json."""
    work = next(work for work in WORKS if work.name == data["work"])
    return Result(work, {name: Measured(*m) for name, m in data["measured"].items()}, data["absent"])
