"""The read yardstick: compiles read_speed.c into a temporary folder and calls it. Used by contenders.py."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@functools.cache
def _compiled() -> Callable[[int, int, int], int]:
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if compiler is None:
        raise ImportError("no C compiler (cc, gcc or clang) for read_speed.c")
    flags = ["-mavx2"] if platform.machine() in ("x86_64", "AMD64") else []
    source = Path(__file__).with_name("read_speed.c")
    with tempfile.TemporaryDirectory(prefix="gqa-bench-") as folder:
        library = str(Path(folder, "read_speed.so"))
        command = [compiler, "-O3", *flags, "-shared", "-fPIC", "-fopenmp", str(source), "-o", library]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise ImportError(f"{compiler} -fopenmp does not compile read_speed.c: {done.stderr.strip()[:200]}")
        function = ctypes.CDLL(library).read_speed_sum
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int64
    return function


def reader(threads: int) -> Callable[[NDArray[np.generic]], int]:
    """A function that sums a C-contiguous array, aligned to 32 bytes, as 8-byte integers with `threads` threads.

    Raises
    ------
    ImportError
        If there is no C compiler with OpenMP.
    """
    read_sum = _compiled()

    def read(array: NDArray[np.generic]) -> int:
        assert array.flags.c_contiguous
        assert array.ctypes.data % 32 == 0
        return read_sum(array.ctypes.data, array.nbytes, threads)

    return read
