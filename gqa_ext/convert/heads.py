"""One layer's attention: where each head lies in its tensors, and what pooling makes of them.

A tensor is described by its slots: which head of q, k, v or o each one is. The result is described alike with
fewer heads, and the slot means between the two follow. Called by layouts.py and attention.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._messages import fail
from .architectures import Layout
from .methods import as_members, as_shares
from .slots import SlotMean

__all__ = ["HeadSlots", "Layer", "LayerChange", "LayerPlan", "Pooling", "change_layer", "read_layer"]

Shapes = Mapping[str, tuple[int, ...]]
Head = tuple[str, int]  # ("k", 3): the fourth key head


@dataclass(frozen=True)
class HeadSlots:
    """Where one projection's heads lie before and after, to compare them.

    Attributes
    ----------
    name : str
        The tensor, the same before and after.
    axis, slot : int
        As in :class:`SlotMean`.
    before, after : tuple of int
        For each query head of the source, in its order: the slot that it reads in the source and in the result.
    """

    name: str
    axis: int
    slot: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    def relative_error(self, source: NDArray[Any], result: NDArray[Any]) -> float:
        """Frobenius norm of what pooling changed for the query heads, over that of what they read before."""
        changed = total = 0.0
        for before, after in set(zip(self.before, self.after, strict=True)):
            old, new = (
                np.take(array, range(index * self.slot, (index + 1) * self.slot), self.axis).astype(np.float64)
                for array, index in ((source, before), (result, after))
            )
            count = sum(pair == (before, after) for pair in zip(self.before, self.after, strict=True))
            changed += count * float(np.square(old - new).sum())
            total += count * float(np.square(old).sum())
        return float(np.sqrt(changed / total)) if total else 0.0


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Attributes
    ----------
    index : int
    num_heads : int
    num_kv_heads_before, num_kv_heads : int
        Key/value heads of the source and after pooling; "expanded" output repeats the latter back to the former.
    head_dim, v_head_dim : int
    groups : tuple of tuples of int
        The source's query heads that share a key/value head.
    key, value : HeadSlots
    """

    index: int
    num_heads: int
    num_kv_heads_before: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    groups: tuple[tuple[int, ...], ...]
    key: HeadSlots
    value: HeadSlots


class Part(NamedTuple):
    """One tensor: slots of `slot` elements along `axis`, arranged as :func:`arrange` says."""

    name: str
    axis: int
    slot: int
    arrangement: str


@dataclass(frozen=True)
class Layer:
    """One layer's attention as it is in the source."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    parts: tuple[Part, ...]
    per_head: Mapping[str, tuple[str, ...]]  # "q" and "k": the tensors of norms that have one for each head


class Pooling(NamedTuple):
    """What is asked of a layer."""

    num_kv_heads: int
    method: str
    groups: Any
    head_weights: Any
    expanded: bool


class LayerChange(NamedTuple):
    """What a layer adds to a plan: see ModelPlan, which has the same fields."""

    layer: LayerPlan
    tensors: dict[str, SlotMean]
    joined: dict[str, tuple[str, ...]]
    dropped: tuple[str, ...]


def arrange(arrangement: str, num_heads: int, num_kv_heads: int) -> list[Head]:
    """The heads in a tensor's slots: of "q", "k", "v" or "o", or of a fused projection."""
    heads = {role: [(role, i) for i in range(num_heads if role in "qo" else num_kv_heads)] for role in "qkvo"}
    if arrangement == "stacked":
        return heads["q"] + heads["k"] + heads["v"]
    if arrangement == "interleaved":
        return [head for triple in zip(heads["q"], heads["k"], heads["v"], strict=True) for head in triple]
    return heads[arrangement]


# ---- the source ----


def read_layer(
    call: str, layout: Layout, index: int, prefix: str, shapes: Shapes, num_heads: int, head_dim: int | None
) -> Layer:
    """Find one layer's tensors and prove that their shapes are those of `num_heads` heads of `head_dim`."""
    names = _names(call, layout, prefix, shapes)
    axis = int(layout.transposed)
    if head_dim is None:
        head_dim = _share(call, names["q"], shapes, axis, num_heads) if not layout.qkv else _share(
            call, names["o"], shapes, 1 - axis, num_heads
        )  # fmt: skip
    v_head_dim = head_dim
    if layout.qkv:
        slots = _share(call, names["qkv"], shapes, axis, head_dim)
        num_kv_heads = num_heads if layout.fused == "interleaved" else (slots - num_heads) // 2
        parts = _with_bias(names, "qkv", shapes, axis, head_dim, layout.fused)
    else:
        num_kv_heads = _share(call, names["k"], shapes, axis, head_dim)
        v_head_dim = _share(call, names["v"], shapes, axis, max(num_kv_heads, 1))
        parts = _with_bias(names, "q", shapes, axis, head_dim, "q")
        parts += _with_bias(names, "k", shapes, axis, head_dim, "k")
        parts += _with_bias(names, "v", shapes, axis, v_head_dim, "v")
        if (stacked := f"{prefix}in_proj_bias") in shapes:  # torch.nn.MultiheadAttention with kdim: one bias for three
            parts.append(Part(stacked, 0, head_dim, "stacked"))
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        name = names[(layout.qkv and "qkv") or "k"]
        _misfit(call, name, shapes[name], axis, f"a divisor of {num_heads} heads of head_dim {head_dim}")
    parts.append(Part(names["o"], 1 - axis, v_head_dim, "o"))
    per_head = {}
    for role, norm, count in (("q", layout.q_norm, num_heads), ("k", layout.k_norm, num_kv_heads)):
        if norm and "{head}" in norm:
            per_head[role] = _per_head(call, prefix + norm, shapes, count, head_dim)
        elif norm:
            parts += _norm(call, f"{prefix}{norm}", shapes, role, count, head_dim)
    layer = Layer(index, num_heads, num_kv_heads, head_dim, v_head_dim, tuple(parts), per_head)
    _check_shapes(call, layer, shapes)
    return layer


def _names(call: str, layout: Layout, prefix: str, shapes: Shapes) -> dict[str, str]:
    """The weights by role, which must be there."""
    roles = {"qkv": layout.qkv} if layout.qkv else {"q": layout.q, "k": layout.k, "v": layout.v}
    names = {}
    for role, module in {**roles, "o": layout.o}.items():
        found = [name for name in spelt(f"{prefix}{module}", "weight") if name in shapes]
        if not found:
            came = f"tensor {prefix}{module}.weight is missing"
            fail(ValueError, call, came, "each layer's q, k, v and o were wanted", "check that all shards are there")
        names[role] = found[0]
    return names


def spelt(module: str, kind: str) -> tuple[str, ...]:
    """The ways in which a module's weight or bias is called."""
    return (f"{module}.{kind}", f"{module}_{kind}", *([module] if kind == "weight" else []))


def _share(call: str, name: str, shapes: Shapes, axis: int, count: int) -> int:
    """The axis's length over `count`, which must divide it."""
    shape = shapes[name]
    if len(shape) != 2 or shape[axis] == 0 or shape[axis] % count:
        _misfit(call, name, shape, axis, f"a multiple of {count}")
    return shape[axis] // count


def _with_bias(
    names: Mapping[str, str], role: str, shapes: Shapes, axis: int, slot: int, arrangement: str
) -> list[Part]:
    weight = names[role]
    module = weight.removesuffix("weight")[:-1] if weight.endswith(("weight",)) else weight
    biases = [name for name in spelt(module, "bias") if name in shapes]
    return [Part(weight, axis, slot, arrangement), *(Part(name, 0, slot, arrangement) for name in biases)]


def _norm(call: str, module: str, shapes: Shapes, role: str, count: int, head_dim: int) -> Iterator[Part]:
    """Weight and bias of a norm, where they belong to single heads; what all heads share stays as it is."""
    for name in (f"{module}.weight", f"{module}.bias"):
        shape = shapes.get(name, (head_dim,))
        if shape == (count, head_dim):
            yield Part(name, 0, 1, role)
        elif shape == (count * head_dim,):
            yield Part(name, 0, head_dim, role)
        elif shape != (head_dim,):
            _misfit(call, name, shape, 0, f"({head_dim},), ({count}, {head_dim}) or ({count * head_dim},)")


def _per_head(call: str, template: str, shapes: Shapes, count: int, head_dim: int) -> tuple[str, ...]:
    """The names of norms of which each head has its own; none, or one for each head."""
    names = tuple(f"{template.format(head=head)}.weight" for head in range(count))
    there = [name for name in names if name in shapes]
    if there and len(there) < count:
        missing = next(name for name in names if name not in shapes)
        wanted = f"one for each of {count} heads was wanted"
        fail(ValueError, call, f"tensor {missing} is missing", wanted, "check that all shards are there")
    for name in there:
        if shapes[name] != (head_dim,):
            _misfit(call, name, shapes[name], 0, f"({head_dim},)")
    return tuple(there)


def _check_shapes(call: str, layer: Layer, shapes: Shapes) -> None:
    for part in layer.parts:
        shape = shapes[part.name]
        length = len(arrange(part.arrangement, layer.num_heads, layer.num_kv_heads)) * part.slot
        if len(shape) <= part.axis or shape[part.axis] != length:
            _misfit(call, part.name, shape, part.axis, str(length))


def _misfit(call: str, name: str, shape: Sequence[int], axis: int, wanted: str) -> None:
    came = f"tensor {name} has shape {tuple(shape)}"
    length = shape[axis] if len(shape) > axis else 0
    fix = "check the number of heads and that config and tensors belong together"
    if length and wanted.isdigit() and int(wanted) > length and int(wanted) % length == 0:
        ranks = int(wanted) // length
        fix = f"it looks like one of {ranks} tensor-parallel ranks; merge the ranks into one checkpoint first"
    fail(ValueError, call, came, f"{wanted} was wanted along axis {axis}", fix)


# ---- the result ----


def change_layer(call: str, layer: Layer, pooling: Pooling) -> LayerChange:
    """The slot means of one layer; tensors that stay as they are have none."""
    groups = as_members(pooling.groups, layer.num_heads, pooling.num_kv_heads, call)
    shares = None if pooling.head_weights is None else as_shares(pooling.head_weights, groups, call)
    ratio = layer.num_heads // layer.num_kv_heads
    pooled = [
        _kv_group(group // ratio, None if shares is None else shares[g], pooling.method)
        for g, group in enumerate(groups)
    ]
    order = groups.ravel().tolist()  # the query heads of the result
    kv_heads = layer.num_kv_heads if pooling.expanded else pooling.num_kv_heads
    repeats = kv_heads // pooling.num_kv_heads

    def sources(head: Head) -> dict[Head, float]:
        role, i = head
        if role in "qo":
            return {(role, order[i]): 1.0}
        return {(role, j): weight for j, weight in pooled[i // repeats].items()}

    tensors = {}
    for part in layer.parts:
        old = arrange(part.arrangement, layer.num_heads, layer.num_kv_heads)
        new = arrange(part.arrangement, layer.num_heads, kv_heads)
        places = {head: place for place, head in enumerate(old)}
        means = [{places[source]: weight for source, weight in sources(head).items()} for head in new]
        if [list(mean) for mean in means] != [[place] for place in range(len(old))]:
            tensors[part.name] = _slot_mean(part.axis, part.slot, means)
    joined: dict[str, tuple[str, ...]] = {}
    dropped: list[str] = []
    for role, names in layer.per_head.items():
        count = layer.num_heads if role == "q" else kv_heads
        dropped += names[count:]
        for i, name in enumerate(names[:count]):
            mean = {names[j]: weight for (_, j), weight in sources((role, i)).items()}
            if list(mean) != [name]:
                joined[name] = tuple(mean)
                tensors[name] = _slot_mean(0, layer.head_dim, [dict(enumerate(mean.values()))])
    return LayerChange(_plan(layer, pooling, groups, kv_heads), tensors, joined, tuple(dropped))


def _kv_group(heads: NDArray[np.int64], shares: NDArray[np.float64] | None, method: str) -> dict[int, float]:
    """The source's key/value heads that a group's query heads read, and how much each counts."""
    if method == "first":
        return {int(heads[0]): 1.0}
    counts: dict[int, float] = {}
    for head, share in zip(heads.tolist(), np.ones(len(heads)) if shares is None else shares.tolist(), strict=True):
        counts[head] = counts.get(head, 0.0) + share
    equal = len(set(counts.values())) == 1
    return dict.fromkeys(counts, 1.0) if equal else counts


def _slot_mean(axis: int, slot: int, means: list[dict[int, float]]) -> SlotMean:
    members = tuple(tuple(mean) for mean in means)
    weights = tuple(tuple(mean.values()) for mean in means)
    plain = all(weight == 1.0 for group in weights for weight in group)
    return SlotMean(axis, slot, members, None if plain else weights)


def _plan(layer: Layer, pooling: Pooling, groups: NDArray[np.int64], kv_heads: int) -> LayerPlan:
    """The layer's line in the plan."""
    ratio = layer.num_heads // layer.num_kv_heads
    place = np.argsort(groups.ravel())  # of each query head of the source in the result
    slots = {}
    for part in layer.parts:
        old = arrange(part.arrangement, layer.num_heads, layer.num_kv_heads)
        new = arrange(part.arrangement, layer.num_heads, kv_heads)
        for role in "kv":
            if (role, 0) in old and role not in slots:  # the weight, which comes before bias and norm
                before = tuple(old.index((role, head // ratio)) for head in range(layer.num_heads))
                after = tuple(new.index((role, int(p) * kv_heads // layer.num_heads)) for p in place)
                slots[role] = HeadSlots(part.name, part.axis, part.slot, before, after)
    lists = tuple(tuple(group) for group in groups.tolist())
    return LayerPlan(
        layer.index, layer.num_heads, layer.num_kv_heads, pooling.num_kv_heads, layer.head_dim, layer.v_head_dim,
        lists, slots["k"], slots["v"],
    )  # fmt: skip
