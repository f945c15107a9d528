"""What a model's config says of attention beside names and shapes, as keywords of GroupedQueryAttention.

Meanings and defaults are those of transformers 5 (models/*/configuration_*.py and modeling_*.py): an entry that a
config.json lacks is what that library takes it for. Called by _from_checkpoint.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ._config_rope import fill_rope, find_rope
from ._messages import fail, short
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
    share: float | None = None  # of each head that is turned; None: all of it, and partial_rotary_factor is not read
    interleaved: bool = False


_PLAIN = Rotation()
ROTATIONS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2"), _PLAIN),
    "phi3": Rotation(share=1.0),
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
            came, wanted = f"config.json has {key} {short(config[key])}", "attention without it was wanted"
            fail(NotImplementedError, call, came, wanted, "use the library that the model comes from")
    options: dict[str, Any] = {}
    if name in ROTATIONS:
        options["rope"] = _rope(call, name, config, layer.head_dim)
    if name == "qwen3":
        options["qk_norm"] = _number(call, config, "rms_norm_eps", 1e-6)
    if name == "gemma2":
        options["scale"] = (_number(call, config, "query_pre_attn_scalar", 256) or 256) ** -0.5
        options["softcap"] = _number(call, config, "attn_logit_softcapping", 50, zero=True)
    if name == "gpt2":
        scale = layer.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        options["scale"] = scale / (number + 1) if config.get("scale_attn_by_inverse_layer_idx") else scale
    if name == "bloom":
        options["alibi_slopes"] = get_alibi_slopes(layer.num_heads)
    if _slides(call, name, config, number):
        width = _number(call, config, "sliding_window", None if name == "phi3" else 4096)
        options["window"] = None if width is None else (int(width) - 1, 0)  # a row counts itself
    return options


def _number(
    call: str, config: Mapping[str, Any], key: str, default: float | None, *, zero: bool = False
) -> float | None:
    """A number above 0, or 0 where that means something, or None where the config says null."""
    entry: float | None = config.get(key, default)
    if entry is None or (type(entry) in (int, float) and (entry > 0 or (zero and entry == 0))):
        return entry
    came = f"config.json has {key} {short(entry)}"
    wanted = f"a number {'of at least' if zero else 'above'} 0 was wanted"
    return fail(ValueError, call, came, wanted, "restore the config")


def _slides(call: str, name: str, config: Mapping[str, Any], number: int) -> bool:
    """Whether a row of this layer sees a window only."""
    types = config.get("layer_types")
    if name == "phi3" or (name == "mistral" and types is None):
        return True
    if name not in ("mistral", "gemma2") and not (name in ("qwen2", "qwen3") and config.get("use_sliding_window")):
        return False
    if types is None:
        first = _number(call, config, "max_window_layers", 28, zero=True) or 0
        return number % 2 == 0 if name == "gemma2" else number >= first
    if not isinstance(types, list) or number >= len(types):
        came = f"config.json has layer_types {short(types)}"
        fail(ValueError, call, came, f"a list with one for layer {number} was wanted", "restore the config")
    return bool(types[number] == "sliding_attention")


def _rope(call: str, name: str, config: Mapping[str, Any], head_dim: int) -> RotaryEmbedding:
    """The config's dict, and what the architecture takes for granted."""
    default, given = ROTATIONS[name], find_rope(config)[1]
    if not isinstance(given, Mapping):
        return RotaryEmbedding(head_dim, scaling=given)  # which says what it takes
    if name == "phi3":
        given, config = _as_longrope(given), {"original_max_position_embeddings": 4096, **config}
    scaling = fill_rope(given, config, *OLD_NAMES.get(name, ()))
    share = _share(call, name, scaling)
    base = _number(call, scaling, "rope_theta", default.base)
    part = {} if share is None else {"partial_rotary_factor": share}
    options: dict[str, Any] = {"base": base, "interleaved": default.interleaved, "scaling": part or None}
    if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
        scaling = {key: entry for key, entry in scaling.items() if key not in ("rope_theta", "partial_rotary_factor")}
        options |= {"scaling": scaling | part, "max_position_embeddings": config.get("max_position_embeddings")}
    return RotaryEmbedding(head_dim, **options)


def _as_longrope(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Phi-3's first files call it su or yarn."""
    if (given.get("rope_type") or given.get("type")) not in ("su", "yarn"):
        return given
    return {key: entry for key, entry in given.items() if key != "type"} | {"rope_type": "longrope"}


def _share(call: str, name: str, scaling: Mapping[str, Any]) -> float | None:
    """The part of a head that is turned; None is all of it."""
    usual = ROTATIONS[name].share
    share = _number(call, scaling, "partial_rotary_factor", usual or 1.0)
    if usual is None and share != 1:
        came = f"config.json has partial_rotary_factor {share}"
        fail(NotImplementedError, call, came, f"1.0 was wanted, as {name} turns whole heads", "restore the config")
    return None if share == 1 else share
