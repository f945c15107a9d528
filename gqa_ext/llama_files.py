"""Folders of Llama-like models, as Hugging Face writes them: config.json and one or more safetensors files.

Llama, Mistral, Qwen2 and Qwen3 differ in a few tensors and in the defaults of config.json, and FAMILIES says in
which. What a config asks for and gqa_ext.llama does not compute is refused by its name. Nothing is assumed of a
file: what is broken is a ValueError that names it.

Called by gqa_ext.llama.load.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ._config_rope import fill_rope, find_rope
from ._messages import Array
from .convert.safetensors import SafetensorsFile
from .convert.source import only_file
from .rope import RotaryEmbedding

__all__ = ["Config", "Weights", "read_folder"]


@dataclass(frozen=True)
class Config:
    """Shape of a Llama-like model; names and defaults are those of Hugging Face's config.json.

    rope_scaling is its dict as it stands (``rope_parameters`` in newer files). layer_windows has one entry for each
    layer, W where a row sees the last W keys up to its own and None where it sees all; () is None for every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    layer_windows: tuple[int | None, ...] = ()
    tie_word_embeddings: bool = False

    def make_rope(self) -> RotaryEmbedding:
        """The rotary embedding of every layer."""
        return RotaryEmbedding(
            self.head_dim, base=self.rope_theta, scaling=self.rope_scaling,
            max_position_embeddings=self.max_position_embeddings,
        )  # fmt: skip


class Weights(NamedTuple):
    """Arrays of float32; those of a layer under the names of gqa_ext.llama.Layer's fields."""

    embed_tokens: Array
    layers: list[dict[str, Array]]
    norm: Array
    lm_head: Array | None  # None where it is tied to embed_tokens


class Family(NamedTuple):
    """What sets one model_type apart."""

    defaults: Mapping[str, Any]  # of its config.json, where they are not Llama's
    unread: Mapping[str, Any] = MappingProxyType({})  # what holds whatever its config.json says
    biases: str = ""  # projections that always have one
    optional_biases: str = ""  # those that attention_bias gives one; others do not read it
    has_qk_norm: bool = False
    has_window: bool = False


_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_EVERY_LAYER_SLIDES = {"use_sliding_window": True, "max_window_layers": 0}  # but where layer_types says which
_QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
FAMILIES = {
    "llama": Family({}, optional_biases="qkvo"),
    "mistral": Family(_MISTRAL, _EVERY_LAYER_SLIDES, has_window=True),
    "qwen2": Family(_QWEN, biases="qkv", has_window=True),
    "qwen3": Family(_QWEN | {"head_dim": 128}, optional_biases="qkvo", has_qk_norm=True, has_window=True),
}

# key of config.json: the one value that is implemented, which is also its default
_FIXED = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None}
_ALIASES = (("hidden_act", "swish"),)  # of transformers' own
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_MOST_LAYERS = 10_000  # more than any model has; a number that is not believed costs no memory
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WIDENED = ("F16", "BF16", "F32", "F64")


def read_folder(folder: Path) -> tuple[Config, Weights]:
    """Config and weights of a folder; see gqa_ext.llama.load for what it raises."""
    path = folder / "config.json"
    given = _read_json(_find(path))
    try:
        family = _find_family(given)
        config = _make_config(given, family)
        config.make_rope()  # what it cannot do is said before gigabytes are read
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"load(): {path}: {error}") from None
    biases = family.biases + (family.optional_biases if given.get("attention_bias") else "")
    names = _layer_names(config, biases, family.has_qk_norm)
    e = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((_EMBEDDING, _HEAD), (config.vocab_size, e))
    shapes["model.norm.weight"] = (e,)
    shapes |= {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in names.values()
    }
    arrays = _read_arrays(folder, shapes, {_HEAD} if config.tie_word_embeddings else set())
    layers = [
        {field: arrays[f"model.layers.{index}.{name}"] for field, (name, _) in names.items()}
        for index in range(config.num_hidden_layers)
    ]
    embed_tokens, norm, lm_head = arrays[_EMBEDDING], arrays["model.norm.weight"], arrays.get(_HEAD)
    if config.tie_word_embeddings and lm_head is not None:
        if np.array_equal(lm_head, embed_tokens):  # some writers store tied embeddings twice
            lm_head = None
        else:  # as in transformers, which then ties nothing
            config = replace(config, tie_word_embeddings=False)
    return config, Weights(embed_tokens, layers, norm, lm_head)


# --- config.json ------------------------------------------------------------------------------------------


def _find(path: Path) -> Path:
    """The same, if there is such a file."""
    if not path.exists():
        wanted = f"config.json and {_ONE_FILE}, or its shards and their index, were wanted"
        message = f"{path} does not exist; {wanted}: pass the folder of a whole Hugging Face model"
        raise FileNotFoundError(f"load(): {message}")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load(): {path}: no sound UTF-8 JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"load(): {path}: a JSON object was wanted, not {given!r:.40}")
    return given


def _find_family(given: dict[str, Any]) -> Family:
    name = given.get("model_type", "llama")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotImplementedError(f"model_type is {name!r:.40}; implemented are {', '.join(FAMILIES)}")
    for key, wanted in _FIXED.items():
        if given.get(key, wanted) != wanted and (key, given[key]) not in _ALIASES:
            raise NotImplementedError(f"{key} is {given[key]!r:.80}; only {wanted!r} is implemented")
    return FAMILIES[name]


def _make_config(given: dict[str, Any], family: Family) -> Config:
    """An absent key is the family's default; null is derived from others, as is what has no default."""
    known = {**family.defaults, **given, **family.unread}
    if known.get("num_key_value_heads") is None:
        known["num_key_value_heads"] = known.get("num_attention_heads")
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        _check_size(key, known.get(key))
    if known.get("head_dim") is None:
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
    known.setdefault("max_position_embeddings", Config.max_position_embeddings)
    sizes = {key: _check_size(key, known.get(key)) for key in _SIZES}
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {sizes['num_hidden_layers']}; up to {_MOST_LAYERS} are read")
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads {heads}")
    rope = _read_rope(known)
    eps, theta = known.get("rms_norm_eps", Config.rms_norm_eps), rope.pop("rope_theta")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ValueError(f"rms_norm_eps is {eps!r:.40}; a small number was wanted")
    return Config(
        **sizes, rms_norm_eps=eps, rope_theta=theta, rope_scaling=rope or None,
        layer_windows=_find_windows(known, sizes["num_hidden_layers"], family),
        tie_word_embeddings=bool(known.get("tie_word_embeddings", False)),
    )  # fmt: skip


def _check_size(key: str, given: Any) -> int:
    if given is None:
        raise ValueError(f"{key} is missing; is it a model's config.json?")
    if type(given) is not int or given < 1:
        raise ValueError(f"{key} is {given!r:.40}; an integer above 0 was wanted")
    return given


def _read_rope(known: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's dict with rope_theta; without partial_rotary_factor, which none of FAMILIES reads."""
    key, given = find_rope(known)
    if not isinstance(given, dict):
        raise ValueError(f"{key} is {given!r:.40}; an object was wanted")
    if any(isinstance(part, dict) for part in given.values()):
        raise NotImplementedError(f"{key} has a dict for each layer type; only a flat one is implemented")
    rope = {"rope_theta": Config.rope_theta} | fill_rope(given, known)
    share = rope.pop("partial_rotary_factor", 1.0)
    if share != 1.0:
        came, fix = f"partial_rotary_factor is {share!r:.40}", "only 1.0 is implemented: these models turn whole heads"
        raise NotImplementedError(f"{came}; {fix}")
    return rope


def _find_windows(known: dict[str, Any], num_layers: int, family: Family) -> tuple[int | None, ...]:
    """The window of each layer: layer_types says which slide, else those from max_window_layers on."""
    is_used = family.has_window and known["use_sliding_window"]
    window = known["sliding_window"] if is_used else None
    if window is not None:
        _check_size("sliding_window", window)
    types = known.get("layer_types")
    if types is None:
        num_full = num_layers if window is None else known["max_window_layers"]
        types = ["full_attention" if i < num_full else "sliding_attention" for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"layer_types is {types!r:.80}; a list of {num_layers} names was wanted")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(f"layer_types has {name!r:.40}; only full and sliding attention are implemented")
    if window is None and "sliding_attention" in types:
        raise ValueError("layer_types has sliding_attention but there is no sliding_window in use")
    return tuple(window if name == "sliding_attention" else None for name in types)


# --- tensors ----------------------------------------------------------------------------------------------


def _layer_names(config: Config, biases: str, has_qk_norm: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each field of a Layer its tensor's name, behind "model.layers.N.", and shape."""
    e, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, k = config.num_attention_heads * d, config.num_key_value_heads * d
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for field in ("input_layernorm", "post_attention_layernorm"):
        names[field] = (f"{field}.weight", (e,))
    for letter, shape in {"q": (q, e), "k": (k, e), "v": (k, e), "o": (e, q)}.items():
        names[f"{letter}_proj"] = (f"self_attn.{letter}_proj.weight", shape)
        if letter in biases:
            names[f"{letter}_bias"] = (f"self_attn.{letter}_proj.bias", shape[:1])
    for letter in "qk" if has_qk_norm else "":
        names[f"{letter}_norm"] = (f"self_attn.{letter}_norm.weight", (d,))
    for field, shape in {"gate_proj": (f, e), "up_proj": (f, e), "down_proj": (e, f)}.items():
        names[field] = (f"mlp.{field}.weight", shape)
    return names


def _read_arrays(folder: Path, shapes: dict[str, tuple[int, ...]], optional: set[str]) -> dict[str, Array]:
    """The tensors wanted, widened to float32; float32 stays where the file is mapped."""
    path = folder / _INDEX
    if (folder / _ONE_FILE).exists() or not path.exists():
        path = folder / only_file(folder, "load()")
        file = SafetensorsFile(path)
        files = dict.fromkeys(file, file)
    else:
        files = _open_shards(path)
    places = {name: (file, name) for name, file in files.items()}
    if _EMBEDDING not in files and _EMBEDDING.removeprefix("model.") in files:  # saved without its head
        places = {f"model.{name}" if name != _HEAD else name: place for name, place in places.items()}
    _check_tensors(path, places, shapes, optional)
    return {name: np.asarray(places[name][0][places[name][1]], dtype=np.float32) for name in shapes if name in places}


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor, by the index; shards lie beside it and hold what it says, no more."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"load(): {index}: weight_map is {places!r:.40}; an object of tensor: file was wanted")
    for name, shard in places.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            raise ValueError(f"load(): {index}: {name} lies in {shard!r:.80}; the plain name of a file was wanted")
    shards = {shard: SafetensorsFile(_find(index.parent / shard)) for shard in dict.fromkeys(places.values())}
    faults = [f"{name} is not in {shard}" for name, shard in places.items() if name not in shards[shard].tensors]
    faults += [
        f"{name} of {shard} is not in the index"
        for shard, file in shards.items()
        for name in file.tensors
        if places.get(name) != shard
    ]
    _raise_all(index, faults, "are all shards of one model?")
    return {name: shards[shard] for name, shard in places.items()}


def _check_tensors(
    path: Path,
    places: dict[str, tuple[SafetensorsFile, str]],
    shapes: dict[str, tuple[int, ...]],
    optional: set[str],
) -> None:
    """All that is wrong with a folder's tensors, in one message."""
    faults = [f"{name} is missing" for name in shapes.keys() - places.keys() - optional]
    for name, (file, its_name) in places.items():
        info = file.tensors[its_name]
        if name not in shapes and not name.endswith("rotary_emb.inv_freq"):
            faults.append(f"{its_name} is not part of the model")
        elif info.shape != shapes.get(name, info.shape):
            faults.append(f"{its_name} is {info.shape}, wanted {shapes[name]}")
        elif info.dtype not in _WIDENED:
            faults.append(f"{its_name} is {info.dtype}, wanted F16, BF16, F32 or F64")
    _raise_all(path, faults, "does config.json belong to it?")


def _raise_all(path: Path, faults: list[str], question: str) -> None:
    """The first few of what was found, if anything was."""
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"load(): {path}: {'; '.join(sorted(faults)[:5])}{more}; {question}")
