"""Measures gqa_ext against its peers: `python benchmarks/attention.py [--quick] [--only NAME] [--markdown]`.

Every work of works.py, all its contenders interleaved in one run with the same number of threads over the same arrays;
prints medians, rates, our speed over each contender's, and whether the floors of works.py are met.
Needs the `bench` extra: `pip install ".[bench]"`. README.md beside this file says how the numbers are made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import machine
import report
from report import Measured, Result
from timing import Bystanders, round_robin
from works import WORKS, Work


def _arguments() -> argparse.Namespace:
    options = machine.parser("attention, measured against its peers in one interleaved run")
    options.add_argument("--coretype", help=argparse.SUPPRESS)
    options.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    args.rounds = machine.rounds(args)
    names = machine.chosen(options, args.only, [work.name for work in WORKS])
    args.works = [work for work in WORKS if work.name in names]
    return args


def _pin_openblas(coretype: str | None) -> None:
    """OpenBLAS reads its environment once, when NumPy is first imported: settle it before."""
    assert "numpy" not in sys.modules
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    if coretype is not None:
        os.environ["OPENBLAS_CORETYPE"] = coretype


def _measure(work: Work, rounds: int, threads: int) -> Result:
    import contenders
    import threadpoolctl

    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        built, absent = contenders.build(work, threads)
        times = round_robin({name: contender.call for name, contender in built.items()}, rounds)
    measured = {name: Measured(times[name], contender.amount, contender.note) for name, contender in built.items()}
    return Result(work, measured, absent)


def _measure_elsewhere(work: Work, rounds: int, threads: int) -> Result:
    """In a process of its own, whose OpenBLAS is held to the work's core type."""
    own = [sys.executable, str(Path(__file__)), "--json", "--only", work.name, "--coretype", str(work.coretype)]
    options = ["--repeats", str(rounds), "--threads", str(threads)]
    done = subprocess.run([*own, *options], check=True, stdout=subprocess.PIPE, text=True)
    return report.from_json(json.loads(done.stdout))


def main() -> None:
    """Measure, and print as it goes."""
    args = _arguments()
    _pin_openblas(args.coretype)
    if args.json:
        print(json.dumps(report.to_json(_measure(args.works[0], args.rounds, args.threads))))
        return
    print(machine.describe(args.threads, ("gqa_ext", "torch", "onnxruntime", "openvino")), flush=True)
    bystanders = Bystanders()
    results = []
    for work in args.works:
        measure = _measure if work.coretype is None else _measure_elsewhere
        results.append(measure(work, args.rounds, args.threads))
        if not args.markdown:
            print(f"\n{report.text(results[-1])}", flush=True)
    if args.markdown:
        print(f"\n{report.markdown(results)}")
    bystanders.report(args.rounds)


if __name__ == "__main__":
    main()
