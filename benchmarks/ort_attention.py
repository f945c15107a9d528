"""ONNX Runtime's attention, as a one-node model made in memory. Used by contenders.py; needs onnx and onnxruntime.

Causal and one-row works run com.microsoft.GroupQueryAttention in its decoding set-up: K and V lie in the cache
buffers (B, Hkv, S, D), past and present are the same buffer, and the last seq_q rows come in once more as the new
keys (it copies them to where they already are). Works that are not causal run ONNX's own Attention operator, as
GroupQueryAttention is always causal. Everything is bound beforehand (IO binding), so a call copies nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from works import Work

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def _session(
    operator: str, domain: str, opset: int, inputs: Mapping[str, int], outputs: Mapping[str, int], threads: int,
    **attributes: Any,
) -> onnxruntime.InferenceSession:  # fmt: skip
    node = helper.make_node(operator, list(inputs), list(outputs), domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        operator,
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bound(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> Callable[[], None]:
    """A call over these arrays, in place; an array given twice is one buffer."""
    arrays = [*inputs.values(), *outputs.values()]
    values = {id(array): onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays}
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, values[id(array)])
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, values[id(array)])

    def run(_alive: object = (arrays, values)) -> None:
        session.run_with_iobinding(binding)

    return run


def _bsh(x: Array) -> Array:
    """(B, H, S, D) as (B, S, H * D)."""
    batch, heads, seq, dim = x.shape
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(batch, seq, heads * dim)


def _group_query_attention(work: Work, sets: Sequence[Triple], threads: int, output: Array) -> list[Callable[[], None]]:
    kind = KINDS[work.dtype]
    floats = dict.fromkeys(("query", "key", "value", "past_key", "past_value"), kind)
    outputs = dict.fromkeys(("output", "present_key", "present_value"), kind)
    ints = dict.fromkeys(("seqlens_k", "total_sequence_length"), TensorProto.INT32)
    session = _session(
        "GroupQueryAttention", "com.microsoft", 1, floats | ints, outputs, threads,
        num_heads=work.num_heads, kv_num_heads=work.num_kv_heads, do_rotary=0, local_window_size=-1,
    )  # fmt: skip
    lengths = {
        "seqlens_k": np.full(work.batch, work.seq_k - 1, np.int32),
        "total_sequence_length": np.array(work.seq_k, np.int32),
    }

    def one(query: Array, key: Array, value: Array) -> Callable[[], None]:
        new_key, new_value = (_bsh(x[:, :, -work.seq_q :]) for x in (key, value))
        inputs = {"query": _bsh(query), "key": new_key, "value": new_value, "past_key": key, "past_value": value}
        return _bound(session, inputs | lengths, {"output": output, "present_key": key, "present_value": value})

    return [one(*arrays) for arrays in sets]


def _attention(work: Work, sets: Sequence[Triple], threads: int, output: Array) -> list[Callable[[], None]]:
    names = ("query", "key", "value")
    kind = KINDS[work.dtype]
    session = _session("Attention", "", 23, dict.fromkeys(names, kind), {"output": kind}, threads)
    return [_bound(session, dict(zip(names, arrays, strict=True)), {"output": output}) for arrays in sets]


def build(work: Work, sets: Sequence[Triple], threads: int) -> tuple[Callable[[int], Array], str]:
    """The call, which returns a view of (B, H, S, D), and the operator's name."""
    if work.dtype not in KINDS:
        raise ImportError(f"onnxruntime: its attention takes no {work.dtype} on the CPU")
    if work.is_causal or work.seq_q == 1:
        name = "GroupQueryAttention"
        output = np.empty((work.batch, work.seq_q, work.num_heads, work.head_dim), work.dtype)
        runs = _group_query_attention(work, sets, threads, output.reshape(work.batch, work.seq_q, -1))
        output = output.swapaxes(1, 2)
    else:
        name = "Attention"
        output = np.empty_like(sets[0][0])
        runs = _attention(work, sets, threads, output)

    def call(i: int) -> Array:
        runs[i % len(runs)]()
        return output

    return call, name
