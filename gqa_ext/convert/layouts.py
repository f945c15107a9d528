"""From a config and the headers of its tensors to a plan: which tensors change, and how.

Nothing is read but names, shapes and dtypes, so every refusal comes before the first weight. architectures.py says
what tensors are called, heads.py does one layer. Called by whatever converts, inspects or loads checkpoints.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._arguments import as_flag, as_int, as_kv_heads
from .._messages import fail, kind, short
from .architectures import ARCHITECTURES, LONE, Layout, as_layout, unknown
from .heads import Layer, LayerPlan, Pooling, Shapes, change_layer, read_layer
from .methods import check_method
from .refusals import refuse_extra_keys, refuse_quantised, refuse_ranks, refuse_unpoolable
from .safetensors import TensorInfo
from .slots import SlotMean

__all__ = ["Model", "ModelPlan", "plan_model", "read_model"]

CALL = "convert_checkpoint"
EXPAND = "pass output='expanded', which repeats the pooled heads back so that the same architecture loads them"


@dataclass(frozen=True)
class ModelPlan:
    """What a conversion does to a checkpoint.

    Attributes
    ----------
    architecture : str
        The config's model_type, "layout" for one given by hand, or the names of a lone state dict.
    config : dict
        The new config, in the order of the source's; empty for a lone state dict.
    tensors : dict of str to SlotMean
        Tensors that change. Every other one that is not dropped stays as it is, byte for byte.
    layers : tuple of LayerPlan
        All layers, changed or not.
    joined : dict of str to tuple of str
        Where a result is made of several tensors of the source: their names. ``tensors[name]`` is for these laid one
        behind the other along axis 0 (StableLM's norms, of which each head has its own).
    dropped : tuple of str
        Tensors of the source that the result does not have, because there are fewer heads.
    """

    architecture: str
    config: dict[str, Any]
    tensors: dict[str, SlotMean]
    layers: tuple[LayerPlan, ...]
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A checkpoint's attention as it is."""

    architecture: str
    layout: Layout
    layers: tuple[Layer, ...]


def plan_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    num_kv_heads: Any,
    *,
    method: str = "mean",
    groups: Any = None,
    layers: Iterable[int] | None = None,
    output: str = "native",
    allow_gqa: bool = False,
    layout: Any = None,
    num_heads: int | None = None,
) -> ModelPlan:
    """Plan a conversion from the config and the headers alone.

    Parameters
    ----------
    config : mapping
        What config.json says; empty for a lone state dict.
    tensors : mapping of str to TensorInfo
        All tensors, from all shards.
    num_kv_heads : int or sequence of int
        For all layers, or one for each layer. None of the known architectures has a config for different ones, so
        these need ``output="expanded"``; a lone state dict does not.
    method, groups : as in :func:`gqa_ext.convert.pool_heads`
        Groups are of query heads: for all layers, or a dict from layer to groups, where layers that are not named
        group neighbours.
    layers : iterable of int, optional
        Pool only these.
    output : {'native', 'expanded'}
        'expanded' repeats the pooled heads back to the source's number, so that the same architecture loads it.
    allow_gqa : bool
        Take a source that is grouped already; its key/value heads are pooled further.
    layout : Layout or dict, optional
        Names the tensors by hand; see :class:`Layout`.
    num_heads : int, optional
        Query heads, for a lone state dict, which does not say.

    Returns
    -------
    ModelPlan
        It changes nothing where `num_kv_heads` is the source's and no groups are given.

    Raises
    ------
    ValueError
        Quantised, tensor-parallel, grouped already, unknown, not expressible, or arguments that do not fit. The
        message names the tensor; the caller knows the file.
    TypeError
        An argument of another kind.

    Examples
    --------
    >>> config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8}
    >>> names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    >>> plan = plan_model(config, {name: TensorInfo("F32", (64, 64)) for name in names}, 2)
    >>> plan.config["num_key_value_heads"], sorted(plan.tensors) == sorted(names[1:3])
    (2, True)
    """
    check_method(method, None, CALL)
    expanded = _is_expanded(output)
    refuse_extra_keys(CALL, tensors)
    model = read_model(CALL, config, tensors, layout, num_heads)
    _refuse_grouped(model, as_flag(CALL, "allow_gqa", allow_gqa))
    wanted = _wanted(num_kv_heads, _chosen(layers, model), model)
    if not expanded:
        _check_expressible(config, model, wanted)
    per_layer = _groups_of_layers(groups, model)
    tensor_changes: dict[str, SlotMean] = {}
    joined: dict[str, tuple[str, ...]] = {}
    plans: list[LayerPlan] = []
    dropped: list[str] = []
    for layer in model.layers:
        pooling = Pooling(wanted[layer.index], method, per_layer.get(layer.index), None, expanded)
        change = change_layer(CALL, layer, pooling)
        _refuse_moved(model, change.layer)
        plans.append(change.layer)
        tensor_changes |= change.tensors
        joined |= change.joined
        dropped += change.dropped
    for name in [*tensor_changes, *(name for names in joined.values() for name in names)]:
        refuse_unpoolable(CALL, name, tensors[name])
    kv_heads = {layer.num_kv_heads for layer in model.layers} if expanded else set(wanted.values())
    new = _new_config(config, model.layout, kv_heads) if tensor_changes else dict(config)
    return ModelPlan(model.architecture, new, tensor_changes, tuple(plans), joined, tuple(dropped))


# ---- the source ----


def read_model(
    call: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], layout: Any, num_heads: int | None
) -> Model:
    """Find the attention of all layers; ValueError for what cannot be converted."""
    refuse_quantised(call, config, tensors)
    refuse_ranks(call, config, tensors)
    shapes = {name: info.shape for name, info in tensors.items()}
    architecture, row = _architecture(call, config, shapes, layout)
    num_heads = _num_heads(call, config, num_heads)
    head_dim = _head_dim(call, config, row, num_heads)
    found = find_layers(call, row, shapes)
    _check_layer_count(call, config, list(found))
    layers = tuple(read_layer(call, row, index, prefix, shapes, num_heads, head_dim) for index, prefix in found.items())
    for layer in layers:
        for part in layer.parts:
            refuse_unpoolable(call, part.name, tensors[part.name])
        _check_kv_heads(call, config, row, layer)
    return Model(architecture, row, layers)


def _architecture(call: str, config: Mapping[str, Any], shapes: Shapes, layout: Any) -> tuple[str, Layout]:
    """The row by hand, by the config, or by the names of a lone state dict."""
    if layout is not None:
        return "layout", as_layout(call, layout)
    if not config:
        for name, row in LONE.items():
            if any(_output_is_there(row, prefix, shapes) for prefix in _matches(row, shapes).values()):
                return name, row
        fix = "pass layout= with the names, as {'layer': '', 'q': 'wq', 'k': 'wk', 'v': 'wv', 'o': 'wo'}"
        fail(ValueError, call, "the state dict has no attention of known names", f"{'; '.join(LONE)} were wanted", fix)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        unknown(call, model_type, next((key for key in config if key in ("text_config", "llm_config")), None))
    return model_type, ARCHITECTURES[model_type]


def _output_is_there(row: Layout, prefix: str, shapes: Shapes) -> bool:
    return any(name in shapes for name in (f"{prefix}{row.o}.weight", f"{prefix}{row.o}"))


def _matches(row: Layout, names: Iterable[str]) -> dict[tuple[str, ...], str]:
    """What stands before the names of each layer, by (what stands before the layer's own part, its number)."""
    part = re.escape(row.layer).replace(re.escape("{layer}"), r"(\d+)")
    pattern = re.compile(rf"(((?:.*\.)?){part}){re.escape(row.anchor)}(?:[._]weight)?", re.DOTALL)
    found = filter(None, map(pattern.fullmatch, names))
    return {match.groups()[1:]: match[1] for match in found}


def find_layers(call: str, row: Layout, names: Iterable[str]) -> dict[int, str]:
    """The number of each layer, in order, and what stands before its names."""
    found = _matches(row, names)
    if not found:
        came = f"no tensor is called {row.layer}{row.anchor}.weight, whatever may stand before it"
        fail(ValueError, call, came, "at least one layer was wanted", "pass layout= with the names that are there")
    if "{layer}" not in row.layer:
        return dict(enumerate(sorted(found.values(), key=_natural)))
    before = sorted({key[0] for key in found})
    if len(before) > 1:
        came = f"layers are called {' and '.join(f'{name}{row.layer}' for name in before)}"
        fail(ValueError, call, came, "one stack of layers was wanted", "pass layout= with the full names of one")
    return dict(sorted((int(key[1]), prefix) for key, prefix in found.items()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _number(call: str, config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these entries that the config has."""
    for key in keys:
        entry = config.get(key)
        if entry is not None:
            if type(entry) is not int or entry < 1:
                came = f"config.json has {key} {short(entry)}"
                fail(ValueError, call, came, "an int of at least 1 was wanted", "restore the config")
            return entry
    return None


def _num_heads(call: str, config: Mapping[str, Any], asked: int | None) -> int:
    told = _number(call, config, "num_attention_heads", "n_head")
    if asked is not None:
        asked = as_int(call, "num_heads", asked, 1)
        if told is not None and told != asked:
            came = f"num_heads is {asked} but config.json says {told}"
            fail(ValueError, call, came, "the same number was wanted", "leave num_heads out")
        return asked
    if told is None:
        wanted = "the number of query heads was wanted, which neither a config nor a tensor says"
        fail(ValueError, call, "num_heads is None", wanted, "pass num_heads=")
    return told


def _head_dim(call: str, config: Mapping[str, Any], row: Layout, num_heads: int) -> int | None:
    """What the config says; None where it says nothing and the tensors have to."""
    told = _number(call, config, "head_dim") or row.head_dim
    hidden = _number(call, config, "hidden_size", "n_embd", "n_embed")
    return told or (hidden and hidden // num_heads)


def _check_layer_count(call: str, config: Mapping[str, Any], there: list[int]) -> None:
    count = _number(call, config, "num_hidden_layers", "n_layer") or max(there) + 1
    if len(there) != count or there != list(range(len(there))):
        missing = sorted(set(range(min(count, max(there) + 9))) - set(there))  # however large a number config.json has
        came = f"the tensors lack layers {missing}" if missing else f"the tensors have {len(there)} layers"
        fix = "check that all shards are there and that the config belongs to them"
        fail(ValueError, call, came, f"layers 0 to {count - 1} were wanted", fix)


def _check_kv_heads(call: str, config: Mapping[str, Any], row: Layout, layer: Layer) -> None:
    told = _number(call, config, row.kv_key) if row.kv_key else None
    if told is not None and told != layer.num_kv_heads:
        came = f"config.json has {row.kv_key} {told} but layer {layer.index} has {layer.num_kv_heads} key/value heads"
        fail(ValueError, call, came, "the same number was wanted", "check that config and tensors belong together")


# ---- the arguments ----


def _is_expanded(output: Any) -> bool:
    if output not in ("native", "expanded"):
        wanted = "'native' or 'expanded' was wanted"
        fail(ValueError, CALL, f"output is {short(output)}", wanted, "leave it out for 'native'")
    return bool(output == "expanded")


def _refuse_grouped(model: Model, allow_gqa: bool) -> None:
    for layer in model.layers:
        if layer.num_kv_heads != layer.num_heads and not allow_gqa:
            came = f"the source is grouped already: {layer.num_kv_heads} key/value heads for {layer.num_heads} heads"
            fail(ValueError, CALL, came, "a multi-head checkpoint was wanted", "pass allow_gqa=True to pool it further")


def _refuse_moved(model: Model, layer: LayerPlan) -> None:
    """Query heads whose number means something stay where they are."""
    order = [head for group in layer.groups for head in group]
    if model.layout.fixed_heads and order != sorted(order):
        came = f"groups of layer {layer.index} move query heads, and each has an ALiBi slope by its number"
        wanted = f"groups of heads in their order were wanted for {model.architecture!r}"
        fail(ValueError, CALL, came, wanted, "leave groups out to pool neighbours")


def _chosen(layers: Any, model: Model) -> set[int]:
    """The layers that are pooled."""
    there = {layer.index for layer in model.layers}
    if layers is None:
        return there
    wanted, fix = f"layers from 0 to {max(there)} were wanted", "pass layers=range(start, stop) or a list"
    if isinstance(layers, (str, bytes, Mapping)) or not isinstance(layers, Iterable):
        fail(TypeError, CALL, f"layers is {kind(layers)}", wanted, fix)
    chosen = {as_int(CALL, "a layer in layers", layer, 0) for layer in layers}
    if not chosen <= there:
        fail(ValueError, CALL, f"layers has {sorted(chosen - there)}", wanted, fix)
    return chosen


def _wanted(num_kv_heads: Any, chosen: set[int], model: Model) -> dict[int, int]:
    """Key/value heads of each layer after pooling."""
    numbers = [num_kv_heads] * len(model.layers)
    if isinstance(num_kv_heads, Iterable) and not isinstance(num_kv_heads, (str, bytes, Mapping)):
        numbers = list(num_kv_heads)
        if len(numbers) != len(model.layers):
            came = f"num_kv_heads has {len(numbers)} entries for {len(model.layers)} layers"
            fail(ValueError, CALL, came, "one for each layer was wanted", "pass an int for all layers")
    wanted = {}
    for layer, number in zip(model.layers, numbers, strict=True):
        fit = as_kv_heads(CALL, number, layer.num_heads)
        if layer.num_kv_heads % fit:
            came = f"num_kv_heads is {fit} for a source of {layer.num_kv_heads} key/value heads"
            fail(ValueError, CALL, came, "a divisor of the source's was wanted", f"pass {layer.num_kv_heads} or fewer")
        wanted[layer.index] = fit if layer.index in chosen else layer.num_kv_heads
    return wanted


def _check_expressible(config: Mapping[str, Any], model: Model, wanted: Mapping[int, int]) -> None:
    """What the config can say, and the tensors of one layer can hold."""
    pooled = any(wanted[layer.index] != layer.num_kv_heads for layer in model.layers)
    if pooled and (model.layout.fused == "interleaved" or (config and model.layout.kv_key is None)):
        came = f"the format of {model.architecture!r} has no place for fewer key/value heads than query heads"
        fail(ValueError, CALL, came, "a format that can express GQA was wanted for output='native'", EXPAND)
    numbers = sorted(set(wanted.values()))
    if config and len(numbers) > 1:
        came = f"layers would have {', '.join(map(str, numbers))} key/value heads"
        wish = f"one number for all layers was wanted, since the config of {model.architecture!r} has one"
        fail(ValueError, CALL, came, wish, EXPAND)


def _groups_of_layers(groups: Any, model: Model) -> dict[int, Any]:
    """What is asked for each layer; heads.py checks that it is a partition."""
    if groups is None:
        return {}
    if not isinstance(groups, Mapping):
        return {layer.index: groups for layer in model.layers}
    there = {layer.index for layer in model.layers}
    strange = [layer for layer in groups if layer not in there]
    if strange:
        came = f"groups names the layers {', '.join(f'{layer!r:.20}' for layer in strange)}"
        fail(ValueError, CALL, came, f"layers from 0 to {max(there)} were wanted", "name layers that are there")
    return dict(groups)


def _new_config(config: Mapping[str, Any], row: Layout, kv_heads: set[int]) -> dict[str, Any]:
    """The config with the number of key/value heads that the tensors now have, and nothing else new."""
    new = dict(config)
    if config and row.kv_key is not None and len(kv_heads) == 1:
        new[row.kv_key] = kv_heads.pop()
    return new
