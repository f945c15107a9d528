"""What a model's config says of attention beside names and shapes, as keywords of GroupedQueryAttention.

Meanings and defaults are those of transformers 5 (models/*/configuration_*.py and modeling_*.py): an entry that a
config.json lacks is what that library takes it for. Called by _from_checkpoint.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ._messages import fail
from .bias import get_alibi_slopes
from .convert.architectures import LONE
from .convert.layouts import Model
from .rope import RotaryEmbedding

__all__ = ["RMS_NORMS", "attention_options"]

# Whose q_norm and k_norm are one RMSNorm for all heads, as ours: the others' are LayerNorms or span all heads.
RMS_NORMS = ("qwen3", *LONE, "layout")


class Rotation(NamedTuple):
    """RoPE where the config is silent."""

    base: float = 10000.0
    share: float = 1.0  # of each head that is turned
    interleaved: bool = False


_PLAIN = Rotation()
ROTATIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "phi3"), _PLAIN),
    "phi": Rotation(share=0.5),
    "stablelm": Rotation(share=0.25),
    "cohere": Rotation(base=500000.0, interleaved=True),
    "gpt_neox": Rotation(share=0.25),
}
OLD_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # of rope_theta and partial_rotary_factor


def attention_options(call: str, model: Model, config: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Keywords for layer `number`; none for a layout by hand or a lone state dict, of which nothing is known.

    NotImplementedError for an entry that the module cannot express.
    """
    name, layer = model.architecture, model.layers[number]
    for key in ("clip_qkv", "use_bidirectional_attention"):
        if name in ROTATIONS and config.get(key):
            came, wanted = f"config.json has {key} {config[key]!r:.40}", "attention without it was wanted"
            fail(NotImplementedError, call, came, wanted, "use the library that the model comes from")
    options: dict[str, Any] = {}
    if name in ROTATIONS:
        options["rope"] = _rope(name, config, layer.head_dim)
    if name in RMS_NORMS and name in ROTATIONS:
        options["qk_norm"] = config.get("rms_norm_eps", 1e-6)
    if name == "gemma2":
        options["scale"] = config.get("query_pre_attn_scalar", 256) ** -0.5
        options["softcap"] = config.get("attn_logit_softcapping", 50.0)
    if name == "gpt2":
        scale = layer.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        options["scale"] = scale / (number + 1) if config.get("scale_attn_by_inverse_layer_idx") else scale
    if name == "bloom":
        options["alibi_slopes"] = get_alibi_slopes(layer.num_heads)
    width = _window(name, config, number)
    if width is not None:
        options["window"] = (width - 1, 0)
    return options


def _window(name: str, config: Mapping[str, Any], number: int) -> int | None:
    """How many positions a row sees, its own among them."""
    types = config.get("layer_types")
    if name == "phi3":
        return config.get("sliding_window")
    width: int | None = config.get("sliding_window", 4096)
    if name == "mistral":
        return width
    if name in ("qwen2", "qwen3"):
        slides = bool(config.get("use_sliding_window")) and number >= config.get("max_window_layers", 28)
        width = width if config.get("use_sliding_window") else None
    elif name == "gemma2":
        slides = number % 2 == 0
    else:
        return None
    return width if (types[number] == "sliding_attention" if types else slides) else None


def _rope(name: str, config: Mapping[str, Any], head_dim: int) -> RotaryEmbedding:
    """From either place where a config keeps it: rope_parameters, or rope_scaling with rope_theta beside."""
    default = ROTATIONS[name]
    base_key, share_key = OLD_NAMES.get(name, ("rope_theta", "partial_rotary_factor"))
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return RotaryEmbedding(head_dim, scaling=given)  # which says what it takes
    base = given.get("rope_theta", config.get(base_key, default.base))
    share = given.get("partial_rotary_factor", config.get(share_key, default.share))
    rotary_dim = None if share == 1 else int(head_dim * share)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return RotaryEmbedding(head_dim, base=base, rotary_dim=rotary_dim, interleaved=default.interleaved)
    scaling = {key: entry for key, entry in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if name == "phi3" and kind in ("su", "yarn"):  # what Phi-3's first files call longrope
        scaling = {**scaling, "rope_type": "longrope"}
        scaling.pop("type", None)
    if config.get("original_max_position_embeddings") is not None:
        scaling.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    positions = config.get("max_position_embeddings")
    return RotaryEmbedding(
        head_dim, base=base, rotary_dim=rotary_dim, interleaved=default.interleaved, scaling=scaling,
        max_position_embeddings=positions,
    )  # fmt: skip
