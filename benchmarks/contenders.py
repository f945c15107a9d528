"""Builds every contender of a work over the same arrays: ours, peers, NumPy, and yardsticks.

Called by attention.py. A contender that cannot take part (not installed, no such dtype) is returned as the reason why,
never left out in silence; one that computes something else than NumPy's attention raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name "bfloat16"
import numpy as np
import threadpoolctl
from numpy.typing import NDArray
from works import GEMM, GGML, NUMPY, OPENVINO, ORT, OURS, READ, TORCH, WIDEST, Work

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]
Built = tuple[Callable[[int], Any], str]
"""A call over the data set with the given number, and a note on how it is done."""

GEMM_SIZE = 2048
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest error over the largest output. Halves: four roundings (libraries may round the weights too)."""
GGML_TOLERANCE = 5e-2
"""ggml adds up weighted float16 values in float16."""
CACHE_NBYTES = 256 << 20
"""Sets of K and V that decode cycles over fill at least this, eight times the largest L3 slice in common use."""


@dataclass(frozen=True)
class Contender:
    call: Callable[[int], Any]
    amount: int
    """FLOP or bytes that a call gets through."""
    note: str = ""


def _aligned(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    """Standard normal numbers in an array that starts at a multiple of 64 bytes."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    array = room[start : start + nbytes].view(dtype).reshape(shape)
    if array.dtype in (np.float32, np.float64):
        rng.standard_normal(out=array, dtype=array.dtype)
    else:
        array[...] = rng.standard_normal(shape, np.float32)
    return array


def _wide(array: Array) -> Array:
    """What NumPy computes with: halves as float32, others as they are."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def make_sets(work: Work) -> list[Triple]:
    """Query, key and value; for works measured in bytes, as many sets as no cache holds."""
    rng = np.random.default_rng(0)
    count = max(2, -(-CACHE_NBYTES // work.kv_nbytes)) if work.unit == "B" else 1
    query = (work.batch, work.num_heads, work.seq_q, work.head_dim)
    key = (work.batch, work.num_kv_heads, work.seq_k, work.head_dim)
    one, two, three = [tuple(_aligned(shape, work.dtype, rng) for _ in range(count)) for shape in (query, key, key)]
    return list(zip(one, two, three, strict=True))


def numpy_attention(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
    """Attention as two stacked matmuls; a group's heads are rows of one product. `bias` is (Sq, Sk)."""
    batch, heads, seq_q, dim = query.shape
    kv_heads, seq_k = key.shape[1:3]
    rows = (query * query.dtype.type(dim**-0.5)).reshape(batch, kv_heads, -1, dim)
    scores = rows @ key.swapaxes(-1, -2)
    if bias is not None:
        scores = scores.reshape(batch, heads, seq_q, seq_k)
        scores += bias
        scores = scores.reshape(batch, kv_heads, -1, seq_k)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    return (scores @ value / total).reshape(query.shape)


def _numpy(work: Work, sets: Sequence[Triple]) -> Built:
    bias = None
    if work.is_causal:
        dead = ~np.tri(work.seq_q, work.seq_k, work.seq_k - work.seq_q, dtype=bool)
        bias = np.where(dead, -np.inf, 0).astype(_wide(sets[0][0][:0]).dtype)
    return lambda i: numpy_attention(*sets[i % len(sets)], bias), ""


def _ours(work: Work, sets: Sequence[Triple], threads: int, isa: str | None) -> Built:
    import gqa_ext.testing

    gqa_ext.set_num_threads(threads)
    attention = gqa_ext.scaled_dot_product_attention
    alignment = "lower_right" if work.is_causal and work.seq_q != work.seq_k else None

    def plain(i: int) -> Array:
        return attention(*sets[i % len(sets)])

    def causal(i: int) -> Array:
        return attention(*sets[i % len(sets)], is_causal=True, causal_alignment=alignment)

    call = causal if work.is_causal else plain
    if isa is None:
        return call, ""

    def restricted(i: int) -> Array:
        with gqa_ext.testing.use_isa(isa):
            return call(i)

    return restricted, isa


def _gemm(work: Work) -> Built:
    rng = np.random.default_rng(1)
    dtype = "float64" if work.dtype == "float64" else "float32"
    a, b = (_aligned((GEMM_SIZE, GEMM_SIZE), dtype, rng) for _ in range(2))
    out = np.empty_like(a)
    kernels = {pool.get("architecture") for pool in threadpoolctl.threadpool_info() if "numpy" in pool["filepath"]}
    return lambda i: np.matmul(a, b, out=out), f"{dtype}, {GEMM_SIZE} cubed, kernel {', '.join(map(str, kernels))}"


def _read(sets: Sequence[Triple], threads: int) -> Built:
    from read_speed import reader

    read = reader(threads)

    def call(i: int) -> int:
        _, key, value = sets[i % len(sets)]
        return read(key) + read(value)

    return call, "of the same K and V"


def _torch(work: Work, sets: Sequence[Triple], threads: int) -> Built:
    import torch_attention

    return torch_attention.build(work, sets, threads)


def _ort(work: Work, sets: Sequence[Triple], threads: int) -> Built:
    import ort_attention

    return ort_attention.build(work, sets, threads)


def _openvino(work: Work, sets: Sequence[Triple], threads: int) -> Built:
    import openvino_attention

    return openvino_attention.build(work, sets, threads)


def _ggml(work: Work, sets: Sequence[Triple], threads: int) -> Built:
    import ggml_attention

    return ggml_attention.build(work, sets, threads)


def _check(name: str, got: Any, want: Array, tolerance: float) -> None:
    result = np.asarray(got.double() if name == TORCH else got)  # NumPy reads no bfloat16 tensor
    error = float(np.abs(result - want).max() / np.abs(want).max())
    if not error < tolerance:
        far = f"{name} differs from NumPy's attention by {error:.3g} of its largest number"
        raise AssertionError(f"{far}: nothing to compare in speed")


def build(work: Work, threads: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every contender of the work that can take part, checked, and the reasons why others cannot."""
    sets = make_sets(work)
    builders: dict[str, Callable[[], Built]] = {
        OURS: lambda: _ours(work, sets, threads, work.isa),
        WIDEST: lambda: _ours(work, sets, threads, None),
        TORCH: lambda: _torch(work, sets, threads),
        ORT: lambda: _ort(work, sets, threads),
        OPENVINO: lambda: _openvino(work, sets, threads),
        GGML: lambda: _ggml(work, sets, threads),
        NUMPY: lambda: _numpy(work, sets),
        GEMM: lambda: _gemm(work),
        READ: lambda: _read(sets, threads),
    }
    want = _numpy(work, [tuple(map(_wide, sets[0]))])[0](0)
    built: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name in work.contenders:
        try:
            call, note = builders[name]()
        except ImportError as reason:
            absent[name] = str(reason)
            continue
        if name not in (GEMM, READ):
            _check(name, call(0), want, GGML_TOLERANCE if name == GGML else TOLERANCE[work.dtype])
        built[name] = Contender(call, 2 * GEMM_SIZE**3 if name == GEMM else work.amount, note)
    return built, absent
