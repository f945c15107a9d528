"""How many threads a call may use before anybody said so.

GQA_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs this process may run on, capped by the CPU quota
of its control group.  Called once, by _core when it is imported.
"""

import math
import os
from collections.abc import Iterator

_MAX = 2**31 - 1  # a C int


def default_num_threads() -> int:
    """Threads that one call may use, the caller among them.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ImportError
        If GQA_NUM_THREADS is not a whole number from 1. A bad OMP_NUM_THREADS is another library's
        business and is passed over; of a list (one number for each nesting level) the first counts.
    """
    text = os.environ.get("GQA_NUM_THREADS", "").strip()
    if text:
        count = _count(text)
        if count is None:
            raise ImportError(
                f"import gqa_ext: environment variable GQA_NUM_THREADS is {text!r} but must be a whole number "
                f"from 1 to {_MAX}; unset it to use the CPUs there are, or set for example GQA_NUM_THREADS=2"
            )
        return count
    return _count(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()) or _available_cpus()


def _count(text: str) -> int | None:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    return number if 1 <= number <= _MAX else None


def _available_cpus() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13: affinity and -X cpu_count
        cpus = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count()
    return max(1, math.ceil(min(cpus or 1, cgroup_cpus())))


def cgroup_cpus(groups: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> float:
    """CPUs that the quotas of this process's control groups allow, inf where there is none.

    A quota binds everything below it, so each group is followed up to the mount. A container often
    sees its own group mounted as the root while `groups` names the host's path: folders that are
    not there are skipped.
    """
    smallest = math.inf
    for line in _read(groups).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in [f"{mount}/{controllers}", f"{mount}/cpu"] if controllers else [mount, f"{mount}/unified"]:
            smallest = min([smallest, *(_quota(root + folder) for folder in _parents(path))])
    return smallest


def _parents(path: str) -> Iterator[str]:
    path = path.rstrip("/")
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def _quota(folder: str) -> float:
    """CPUs allowed in one control group, of version 2 (one file, quota and period) or 1 (two files)."""
    words = _read(f"{folder}/cpu.max").split()
    if not words:
        words = [*_read(f"{folder}/cpu.cfs_quota_us").split(), *_read(f"{folder}/cpu.cfs_period_us").split()]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max", or no such file
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
