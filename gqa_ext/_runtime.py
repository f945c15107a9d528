"""What the process computes with: threads and instruction set, from the environment and by call.

Read once, when the package is first imported: GQA_ISA here, GQA_NUM_THREADS in _threads.py.
"""

import os
import platform
from pathlib import Path
from typing import TypedDict

from . import _arguments, _core
from ._threads import default_num_threads


class CpuInfo(TypedDict):
    """What :func:`cpu_info` returns."""

    machine: str
    model: str
    logical_cpus: int
    isa: str
    isa_available: list[str]
    num_threads: int


def set_num_threads(n: int) -> None:
    """Let one call use up to ``n`` threads, the caller among them. Process-wide, for calls that start later.

    The results are the same bits for any number.

    Parameters
    ----------
    n : int
        At least 1. At the start it is GQA_NUM_THREADS, else OMP_NUM_THREADS, else what CPU affinity
        and cgroup quota leave.

    Raises
    ------
    ValueError, TypeError
        n is below 1, or no int.

    Examples
    --------
    >>> set_num_threads(2)
    >>> get_num_threads()
    2
    """
    _core.set_num_threads(min(_arguments.as_int("set_num_threads", "n", n, least=1), 2**31 - 1))


def get_num_threads() -> int:
    """How many threads one call may use.

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()


def cpu_info() -> CpuInfo:
    """What gqa_ext found and uses on this machine; plain values, fit for a bug report or JSON.

    Returns
    -------
    dict
        ``isa``, the instruction set in use, and ``isa_available``, all that this CPU and OS can run, widest
        first (avx512_bf16 is used unasked only where it is fast, which is on AMD; GQA_ISA or
        :func:`gqa_ext.testing.use_isa` choose another); ``num_threads``; ``machine`` and ``model``; ``logical_cpus``.

    Examples
    --------
    >>> cpu_info()["isa"] in cpu_info()["isa_available"]
    True
    """
    return {
        "machine": platform.machine(),
        "model": _cpu_model(),
        "logical_cpus": os.cpu_count() or 1,
        "isa": _core.isa_current(),
        "isa_available": list(_core.isa_available()),
        "num_threads": _core.get_num_threads(),
    }


def _cpu_model() -> str:
    """The CPU's name where Linux tells it, else what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _use_environment() -> None:
    """Apply GQA_ISA and the thread count; a bad GQA_ISA stops the import."""
    name = os.environ.get("GQA_ISA")
    if name:
        try:
            _core.isa_use(name)
        except ValueError as error:
            there = ", ".join(_core.isa_available())
            came = f"import gqa_ext: environment variable GQA_ISA is {name!r}"
            wanted = "the name of an instruction set of this CPU was wanted"
            raise ImportError(f"{came}; {wanted}: set it to one of {there}, or unset it") from error
    _core.set_num_threads(default_num_threads())


_use_environment()
