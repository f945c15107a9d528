"""OpenVINO's ScaledDotProductAttention (opset 13) as a one-node model. Used by contenders.py; needs openvino.

The operator wants as many heads of K and V as of Q, or one. `view` gives it each group of heads as one sequence whose
heads share K and V; `broadcast` repeats K and V by nodes inside the model, as converted models do. The faster one
counts. Arithmetic runs in the arrays' dtype where the CPU plugin offers it, and in float32 where it does not (it would
otherwise compute float16 in bfloat16, whose rounding the result check refuses).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13
from timing import best_of
from works import Work

Array = NDArray[Any]
Triple = tuple[Array, Array, Array]
Call = Callable[[int], Array]

TYPES = {"float32": openvino.Type.f32, "float16": openvino.Type.f16, "bfloat16": openvino.Type.bf16}
CAPABILITIES = {"float16": "FP16", "bfloat16": "BF16"}


def _tensor(array: Array) -> openvino.Tensor:
    """A tensor over the caller's memory; bfloat16, which OpenVINO knows and NumPy does not, goes in as 16-bit words."""
    if array.dtype == "bfloat16":
        return openvino.Tensor(array.view(np.uint16), list(array.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


def _repeated(x: openvino.Node, work: Work) -> openvino.Node:
    batch, kv_heads, group = work.batch, work.num_kv_heads, work.num_heads // work.num_kv_heads
    last = [work.seq_k, work.head_dim]
    grouped = opset13.reshape(x, np.array([batch, kv_heads, 1, *last]), False)
    every = opset13.broadcast(grouped, np.array([batch, kv_heads, group, *last]))
    return opset13.reshape(every, np.array([batch, work.num_heads, *last]), False)


def _compiled(work: Work, shapes: Sequence[tuple[int, ...]], repeat: bool, threads: int) -> openvino.CompiledModel:
    core = openvino.Core()
    offered = CAPABILITIES.get(work.dtype) in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    inputs = [opset13.parameter(list(shape), TYPES[work.dtype]) for shape in shapes]
    query, key, value = inputs
    if repeat:
        key, value = _repeated(key, work), _repeated(value, work)
    node = opset13.scaled_dot_product_attention(query, key, value, causal=work.is_causal)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": TYPES[work.dtype] if offered else openvino.Type.f32,
    }
    return core.compile_model(openvino.Model([node], inputs, "attention"), "CPU", options)


def _call(work: Work, model: openvino.CompiledModel, sets: Sequence[Triple]) -> Call:
    tensors = [[_tensor(array) for array in arrays] for arrays in sets]
    request = model.create_infer_request()

    def call(i: int) -> Array:
        for slot, tensor in enumerate(tensors[i % len(tensors)]):
            request.set_input_tensor(slot, tensor)
        request.infer()
        shape = (work.batch, work.num_heads, work.seq_q, work.head_dim)
        return request.get_output_tensor(0).data.view(work.dtype).reshape(shape)

    return call


def build(work: Work, sets: Sequence[Triple], threads: int) -> tuple[Call, str]:
    """The faster form's call, which returns (B, H, Sq, D), its name and the dtype that it computes in."""
    if work.is_causal and work.seq_q != work.seq_k:
        raise ImportError("openvino: its causal mask is aligned upper left")
    shared = (work.batch * work.num_kv_heads, work.num_heads // work.num_kv_heads)
    views = [
        (q.reshape(*shared, *q.shape[2:]), k.reshape(shared[0], 1, *k.shape[2:]), v.reshape(shared[0], 1, *v.shape[2:]))
        for q, k, v in sets
    ]
    compiled = functools.partial(_compiled, work, threads=threads)
    models = {}
    for name, arrays, repeat in (("view", views, False), ("broadcast", sets, True)):
        models[name] = compiled([x.shape for x in arrays[0]], repeat), arrays
    calls = {name: _call(work, model, arrays) for name, (model, arrays) in models.items()}
    name = min(calls, key=lambda form: best_of(calls[form], tries=4))
    precision = models[name][0].get_property("INFERENCE_PRECISION_HINT")
    return calls[name], f"{name}, computes in {precision.get_type_name()}"
