"""What a conversion does to a model's output, by the forward pass of gqa_ext.llama, which is imported when used.

Called by checkpoint.py for ``evaluate=`` and by verify.py.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .source import Source

__all__ = ["bits_per_token", "compare_logits"]

MOST_PARAMETERS = 2_000_000_000  # of a model that is loaded whole, in float32, to verify it


def bits_per_token(folder: str | os.PathLike[str], tokens: Any) -> float:
    """Mean of -log2 p(token | tokens before it) over a batch, without the first token of each row.

    Parameters
    ----------
    folder : path-like
        A model that gqa_ext.llama loads.
    tokens : array_like of int (..., S), S at least 2
    """
    from .. import llama

    ids = np.asarray(tokens)
    if ids.dtype.kind not in "iu" or ids.ndim == 0 or ids.shape[-1] < 2 or ids.size == 0:
        came = f"evaluate is {ids.dtype} {ids.shape}"
        raise ValueError(f"convert_checkpoint(): {came}; token numbers (..., S) were wanted, S at least 2")
    try:
        scores = llama.load(folder).forward(ids)[..., :-1, :]
    except NotImplementedError as error:
        raise ValueError(f"convert_checkpoint(): evaluate needs a Llama-like model; {error}: leave it out") from None
    wide = scores.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(wide - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(wide, ids[..., 1:, None].astype(np.int64), axis=-1)[..., 0]
    return float((norm - chosen).mean() / math.log(2))


def compare_logits(
    source: Source, folder: Path, num_kv_heads: int | None, method: str
) -> tuple[dict[str, float] | None, str]:
    """Largest differences of the logits on a fixed token batch, or None and why not.

    ``difference`` is what pooling did to the source's logits of size up to ``largest``. Where all layers have
    `num_kv_heads`, ``pooled_difference`` is between the result and the source pooled in memory, in float32;
    ``pooled_bound`` is what rounding the pooled weights to the file's dtype may make of it.
    """
    from .. import llama

    infos = source.tensors.values()
    if source.path.is_file() or source.config_text is None:
        return None, "the source is one file, not a model folder"
    if sum(math.prod(info.shape) for info in infos) > MOST_PARAMETERS:
        return None, f"the model has more than {MOST_PARAMETERS:,} parameters"
    try:
        before, after = llama.load(source.folder), llama.load(folder)
        tokens = np.random.default_rng(0).integers(0, before.config.vocab_size, (2, 16))
        old, new = before.forward(tokens), after.forward(tokens)
    except (NotImplementedError, ValueError, OSError) as error:
        return None, str(error)
    largest = float(np.abs(old).max())
    found = {"largest": largest, "difference": float(np.abs(old - new).max())}
    if num_kv_heads is not None:
        pooled = before.pooled(num_kv_heads, method).forward(tokens)
        found["pooled_difference"] = float(np.abs(pooled - new).max())
        half = any(info.dtype in ("F16", "BF16") for info in infos)
        found["pooled_bound"] = largest * (0.1 if half else 1e-3)
    return found, ""
