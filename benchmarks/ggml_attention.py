"""ggml's flash_attn_ext, as llama.cpp decodes with it: compiles ggml_attention.c against a built ggml and calls it.

Used by contenders.py and caches.py, where GQA_GGML names a folder that build_ggml.sh made. Keys and values are float16,
read in place, or Q8_0, made beforehand; queries and output are float32, as in llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from native import compiled
from numpy.typing import NDArray
from works import Work

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]


@functools.cache
def _library() -> ctypes.CDLL:
    home = os.environ.get("GQA_GGML")
    if not home:
        raise ImportError("GQA_GGML names no folder made by benchmarks/build_ggml.sh")
    links = [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lggml", "-lggml-cpu", "-lggml-base"]
    loaded = compiled("ggml_attention.c", ["-O2", f"-I{home}/include"], links)
    sizes = [ctypes.c_int, *[ctypes.c_int64] * 5, ctypes.c_float, ctypes.c_int]
    loaded.attention_make.argtypes = [*[ctypes.c_void_p] * 3, *sizes]
    loaded.attention_make.restype = ctypes.c_void_p
    loaded.attention_run.argtypes = loaded.attention_free.argtypes = [ctypes.c_void_p]
    loaded.attention_run.restype = ctypes.POINTER(ctypes.c_float)
    return loaded


def attention(query: Array, key: Array, value: Array, threads: int) -> Callable[[], Array]:
    """One decoding step, (B, H, 1, D) to the same in float32; keys and values of float32 are kept as Q8_0."""
    library, query = _library(), query.astype(np.float32)
    assert key.dtype == value.dtype
    assert key.dtype in (np.float16, np.float32)
    assert key.shape == value.shape  # the library takes one head_dim
    assert all(array.flags.c_contiguous for array in (query, key, value))
    batch, heads, _, head_dim = query.shape
    kv_heads, seq = key.shape[1:3]
    pointers = [array.ctypes.data for array in (query, key, value)]
    sizes = (key.dtype == np.float32, batch, heads, kv_heads, seq, head_dim, head_dim**-0.5, threads)
    handle = library.attention_make(*pointers, *sizes)
    output = np.ctypeslib.as_array(library.attention_run(handle), (batch, heads, 1, head_dim))  # (batch, 1, heads, ...)

    def run(_alive: object = (query, key, value)) -> Array:
        library.attention_run(handle)
        return output

    weakref.finalize(run, library.attention_free, handle)
    return run


def build(work: Work, sets: Sequence[Triple], threads: int) -> tuple[Callable[[int], Array], str]:
    """The call of a work of one float16 query row, and its name."""
    assert work.seq_q == 1
    assert work.dtype == "float16"
    runs = [attention(*arrays, threads) for arrays in sets]
    return lambda i: runs[i % len(runs)](), "flash_attn_ext"
