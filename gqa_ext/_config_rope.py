"""The rope dict of a config.json, put together from the places where older and newer files keep its parts.

Which place goes first is transformers' choice (RotaryEmbeddingConfigMixin in modeling_rope_utils.py, version 5).
RotaryEmbedding takes what comes out. Called by llama_files.py and _config_options.py.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["fill_rope", "find_rope"]

_EXTENDED = ("yarn", "longrope", "llama3")  # types that know how long texts were in training


def find_rope(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The entry and its name: rope_scaling alone where it says anything, else rope_parameters; {} where neither is."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return key, config.get(key) or {}


def fill_rope(
    given: Mapping[str, Any], config: Mapping[str, Any], theta: str = "rope_theta", share: str = "partial_rotary_factor"
) -> dict[str, Any]:
    """The dict without nulls, and what stands beside it in the config, there named ``theta`` and ``share``.

    Those two fill what the dict lacks; an original_max_position_embeddings beside goes before the dict's own.
    """
    rope = {key: entry for key, entry in given.items() if entry is not None}
    for key, beside in (("rope_theta", theta), ("partial_rotary_factor", share)):
        if config.get(beside) is not None:
            rope.setdefault(key, config[beside])
    original = config.get("original_max_position_embeddings")
    if original is not None and rope.get("rope_type", rope.get("type")) in _EXTENDED:
        rope["original_max_position_embeddings"] = original
    return rope
