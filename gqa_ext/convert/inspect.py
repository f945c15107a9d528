"""What a checkpoint holds, from its headers alone. Works on any safetensors file; known architectures say more.

Called by the command line and by users. Nothing but headers, config and index is read.
"""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .checkpoint import kv_bytes
from .header import TensorInfo
from .layouts import Model, plan_model, read_model
from .source import CONFIG, Source, open_source

__all__ = ["inspect_checkpoint"]

CALL = "inspect_checkpoint"


def inspect_checkpoint(
    path: str | os.PathLike[str], *, num_heads: int | None = None, layout: Any = None
) -> dict[str, Any]:
    """Describe a checkpoint.

    Parameters
    ----------
    path : str or path-like
        A model folder, or a .safetensors or .npz file; of any architecture.
    num_heads : int, optional
        Query heads, where no config says.
    layout : dict, optional
        As in :func:`convert_checkpoint`.

    Returns
    -------
    dict
        Ready for JSON: path, files (each with its metadata), dtypes (bytes of each), parameters, nbytes, tensors
        (name to dtype, shape, bytes and file), attention. The latter is None where the architecture is not known or
        cannot be read, and `reason` says why; else architecture, layers, num_heads, num_kv_heads and head_dim (of
        each layer), kv_bytes_per_token, and kv_bytes_per_token_at each number of key/value heads that all layers
        can be pooled to.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, or no weights in it.
    ValueError
        A file is broken; the message names it.

    Examples
    --------
    >>> from gqa_ext import llama
    >>> attention = inspect_checkpoint(llama.TINY)["attention"]
    >>> attention["architecture"], attention["kv_bytes_per_token_at"]["1"] * 8 == attention["kv_bytes_per_token"]
    ('llama', True)
    """
    sources = _open(Path(path))
    config = sources[0].config
    tensors = {name: info for source in sources for name, info in source.tensors.items()}
    attention, reason = None, None
    try:
        attention = _attention(config, tensors, layout, num_heads)
    except (ValueError, TypeError) as error:
        reason = str(error).partition("(): ")[2]
    dtypes: Counter[str] = Counter()
    for info in tensors.values():
        dtypes[info.dtype] += info.nbytes
    shards = {name: shard for source in sources for name, shard in source.shards.items()}
    return {
        "path": os.fspath(path),
        "model_type": config.get("model_type"),
        "attention": attention,
        "reason": reason,
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "nbytes": sum(info.nbytes for info in tensors.values()),
        "dtypes": dict(dtypes),
        "files": {name: {"metadata": shard.header.metadata} for name, shard in shards.items()},
        "tensors": {
            name: {"dtype": info.dtype, "shape": list(info.shape), "nbytes": info.nbytes, "file": file}
            for file, shard in shards.items()
            for name, info in shard.header.tensors.items()
        },
    }


def _open(path: Path) -> list[Source]:
    """The source; the files of a folder one by one where no config belongs to them."""
    if not path.is_dir() or os.path.lexists(path / CONFIG):
        return [open_source(path, CALL, "path")]
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".npz"))
    if not files:
        raise FileNotFoundError(f"{CALL}(): {path} has no .safetensors or .npz file; one was wanted")
    return [open_source(file, CALL, "path") for file in files]


def _attention(
    config: dict[str, Any], tensors: dict[str, TensorInfo], layout: Any, num_heads: int | None
) -> dict[str, Any]:
    model = read_model(CALL, config, tensors, layout, num_heads)
    choices: dict[str, Any] = {"output": "expanded", "allow_gqa": True, "layout": layout, "num_heads": num_heads}
    plans = {n: plan_model(config, tensors, n, **choices) for n in possible_kv_heads(model)}
    now = plans[max(plans)]
    return {
        "architecture": model.architecture,
        "layers": len(model.layers),
        "num_heads": [layer.num_heads for layer in model.layers],
        "num_kv_heads": [layer.num_kv_heads for layer in model.layers],
        "head_dim": [layer.head_dim for layer in model.layers],
        "expresses_gqa": model.layout.kv_key is not None,
        "dtype": sorted({tensors[layer.key.name].dtype for layer in now.layers}),
        "kv_bytes_per_token": kv_bytes(tensors, now, before=True),
        "kv_bytes_per_token_at": {str(n): kv_bytes(tensors, plan, before=False) for n, plan in plans.items()},
    }


def possible_kv_heads(model: Model) -> list[int]:
    """Numbers to which all layers can be pooled, the largest first."""
    common = math.gcd(*(layer.num_kv_heads for layer in model.layers))
    return [n for n in range(common, 0, -1) if common % n == 0]
