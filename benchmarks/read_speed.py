"""The read yardstick: compiles read_speed.c into a temporary folder and calls it. Used by contenders.py."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

import numpy as np
from native import compiled
from numpy.typing import NDArray


@functools.cache
def _compiled() -> Callable[[int, int, int], int]:
    flags = ["-mavx2"] if platform.machine() in ("x86_64", "AMD64") else []
    function = compiled("read_speed.c", ["-O3", *flags, "-fopenmp"]).read_speed_sum
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
