"""Checkpoints that are refused by name before a weight is read: quantised, cut into tensor-parallel ranks.

Called by layouts.py with a config and the headers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._messages import fail
from .safetensors import TensorInfo

__all__ = ["refuse_extra_keys", "refuse_quantised", "refuse_ranks", "refuse_unpoolable"]

POOLABLE = ("F16", "BF16", "F32", "F64")

# The end of a tensor's name that only a quantised checkpoint has: whose it is.
_QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "SCB": "bitsandbytes 8-bit",
    "absmax": "bitsandbytes 4-bit",
    "quant_map": "bitsandbytes 4-bit",
    "weight_scale_inv": "fp8 block-scaled",
    "weight_scale": "fp8",
    "weight_packed": "compressed-tensors",
}
_STATE = ".quant_state.bitsandbytes__"
_RANK = re.compile(r"(?:^|[._-])(?:tp_|mp_)?rank[_-]?\d+(?:[._-]|$)")
_RANKS = ("tp_size", "tensor_parallel_size", "tensor_model_parallel_size", "world_size")


def refuse_quantised(call: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """A mean of codes is no mean of weights."""
    wanted, fix = "weights in float16, bfloat16, float32 or float64 were wanted", "convert the unquantised checkpoint"
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            method = f" of method {method!r:.60}" if method else ""
            fail(ValueError, call, f"config.json has a {key}{method}: the checkpoint is quantised", wanted, fix)
    for name in tensors:
        method = "bitsandbytes 4-bit" if _STATE in name else _QUANTISED.get(name.rpartition(".")[2])
        if method:
            fail(ValueError, call, f"tensor {name} belongs to a quantised checkpoint ({method})", wanted, fix)


def refuse_ranks(call: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """One rank holds some of the heads only. Ranks that are told by their shapes alone: see heads.py."""
    wanted, fix = "whole tensors were wanted", "merge the ranks into one checkpoint first"
    mapping = config.get("mapping")  # TensorRT-LLM's
    for place in (config, mapping if isinstance(mapping, Mapping) else {}):
        for key in _RANKS:
            if isinstance(place.get(key), int) and place[key] > 1:
                came = f"config.json has {key} {place[key]}: the checkpoint is tensor-parallel"
                fail(ValueError, call, came, wanted, fix)
    for name in tensors:
        if _RANK.search(name):
            fail(ValueError, call, f"tensor {name} belongs to one tensor-parallel rank", wanted, fix)


def refuse_unpoolable(call: str, name: str, info: TensorInfo) -> None:
    """A tensor of heads in a dtype that has no mean."""
    if info.dtype not in POOLABLE:
        kind = "fp8" if info.dtype.startswith("F8") else "quantised"
        came = f"tensor {name} has dtype {info.dtype}: it is {kind}"
        fail(ValueError, call, came, f"{', '.join(POOLABLE)} were wanted", "convert the unquantised checkpoint")


def refuse_extra_keys(call: str, tensors: Iterable[str]) -> None:
    """torch's add_bias_kv: one more key and value for each head, which no grouped layer takes."""
    for name in tensors:
        if name.rpartition(".")[2] in ("bias_k", "bias_v"):
            fix = "build the layer with add_bias_kv=False"
            fail(ValueError, call, f"tensor {name} is an extra key or value", "a layer without them was wanted", fix)
