"""What the measuring programs of this folder share: their options, and the line that says what was measured on what."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every measuring program takes; `rounds` reads two of them."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="three rounds")
    options.add_argument("--repeats", type=int, metavar="N", help="rounds; times are medians over them")
    options.add_argument(
        "--only", action="append", metavar="NAME", help="only works with this in their name; repeatable"
    )
    options.add_argument("--threads", type=int, default=2, metavar="N", help="threads of every contender (default 2)")
    options.add_argument("--markdown", action="store_true", help="print the table of the README")
    return options


def rounds(args: argparse.Namespace, usual: int = 9) -> int:
    """How many rounds the options ask for."""
    return int(args.repeats or (3 if args.quick else usual))


def chosen(options: argparse.ArgumentParser, only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that contain one of `only`, or all; none is a usage error that lists them."""
    kept = [name for name in names if not only or any(part in name for part in only)]
    if not kept:
        options.error(f"--only {only}: no such work; there are: {'; '.join(names)}")
    return kept


class Named(Protocol):
    """Whatever `--only` can choose by its name."""

    @property
    def name(self) -> str: ...


def cases(description: str, known: Sequence[Named]) -> argparse.Namespace:
    """The options of a program that measures cases, with those that are wanted as `cases`."""
    options = parser(description)
    args = options.parse_args()
    names = chosen(options, args.only, [case.name for case in known])
    args.cases = [case for case in known if case.name in names]
    return args


def describe(threads: int, packages: Sequence[str]) -> str:
    """CPU, cores, threads, NumPy with its BLAS kernel, and the versions of the packages."""
    import numpy
    import threadpoolctl

    blas = [pool for pool in threadpoolctl.threadpool_info() if "numpy" in pool["filepath"]]
    kernels = ", ".join(f"{pool['internal_api']} {pool['architecture']}" for pool in blas)
    versions = [f"numpy {numpy.__version__} ({kernels})"]
    versions += [f"{package} {_version(package)}" for package in packages]
    return f"{_cpu_name()}, {os.cpu_count()} cores, threads of each: {threads}; {'; '.join(versions)}"


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__).split("-")[0]  # openvino appends its commit
    except ImportError:
        return "absent"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
