"""One layer's arrays in memory from multi-head to grouped-query: what a checkpoint's conversion does to each layer.

The tables and slot means are those of layouts.py and heads.py, so that arrays and files become the same bits.
Called by users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._arguments import as_array, as_flag, as_int, as_kv_heads
from .._messages import Array, fail, kind, native, short
from .header import TensorInfo, dtype_name
from .heads import LayerChange, Pooling, change_layer
from .layouts import Model, read_model
from .methods import check_method
from .refusals import refuse_extra_keys

__all__ = ["AttentionConversion", "convert_attention"]

CALL = "convert_attention"


@dataclass(frozen=True)
class AttentionConversion:
    """What :func:`convert_attention` gives.

    Attributes
    ----------
    weights : dict of str to ndarray
        All arrays under their names, in their order; those that did not change are the very arrays that came.
    num_heads, num_kv_heads, head_dim : int
        Of the result; with ``output="expanded"`` the pooled heads count once.
    groups : tuple of tuples of int
        The source's query heads that share a key/value head. Query head h of the result is the h-th of these.
    key_error, value_error : float
        Frobenius norm of what pooling changed in the projection, counted for each query head, over that of what was
        there.
    """

    weights: dict[str, Array]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[tuple[int, ...], ...]
    key_error: float
    value_error: float


def convert_attention(
    weights: Mapping[str, ArrayLike],
    num_heads: int,
    num_kv_heads: int,
    *,
    method: str = "mean",
    groups: Any = None,
    head_weights: ArrayLike | None = None,
    output: str = "native",
    allow_gqa: bool = False,
    layout: Any = None,
) -> AttentionConversion:
    """Pool the key and value heads of one attention layer, arXiv:2305.13245.

    Parameters
    ----------
    weights : mapping of str to array_like
        The layer's projections and biases, with or without norms, float16, bfloat16, float32 or float64, under any of
        these names, whatever stands before them: q_proj, k_proj, v_proj and o_proj or out_proj (``.weight`` (out, in),
        ``.bias``), torch.nn.MultiheadAttention's in_proj_weight, in_proj_bias and out_proj, or q, k, v and o.
    num_heads : int
        Query heads.
    num_kv_heads : int
        Key/value heads wanted; divides those that are there.
    method : {'mean', 'first'}
        As in :func:`gqa_ext.convert.pool_heads`.
    groups : sequence of sequences of int, optional
        Which query heads share a key/value head: a partition into `num_kv_heads` lists of equal length, in any order.
        Query heads, their biases and the columns of o_proj are permuted to match, so that head h of the result reads
        key/value head ``h // (num_heads // num_kv_heads)``. None groups neighbours.
    head_weights : array_like (num_heads,), optional
        How much each head counts in its group's mean: `pool_heads`' ``weights``.
    output : {'native', 'expanded'}
        'expanded' repeats the pooled heads back to the number that was there.
    allow_gqa : bool
        Take a layer that is grouped already.
    layout : gqa_ext.convert.Layout or dict, optional
        Names the arrays by hand, fused ones too; see :class:`gqa_ext.convert.Layout`.

    Returns
    -------
    AttentionConversion

    Raises
    ------
    ValueError
        Names, shapes or groups that do not fit, more than one layer, or a grouped one without `allow_gqa`.
    TypeError
        An argument of another kind, or another dtype.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> layer = {f"{name}_proj.weight": rng.standard_normal((64, 64), np.float32) for name in "qkvo"}
    >>> pooled = convert_attention(layer, 8, 2)
    >>> {name: array.shape for name, array in pooled.weights.items()}
    {'q_proj.weight': (64, 64), 'k_proj.weight': (16, 64), 'v_proj.weight': (16, 64), 'o_proj.weight': (64, 64)}
    >>> pooled.groups
    ((0, 1, 2, 3), (4, 5, 6, 7))
    """
    check_method(method, head_weights, CALL)
    if output not in ("native", "expanded"):
        fail(ValueError, CALL, f"output is {short(output)}", "'native' or 'expanded' was wanted", "leave it out")
    arrays = _as_arrays(weights)
    num_heads = as_int(CALL, "num_heads", num_heads, 1)
    refuse_extra_keys(CALL, arrays)
    layer = _only_layer(_read(arrays, num_heads, layout))
    if layer.num_kv_heads != num_heads and not as_flag(CALL, "allow_gqa", allow_gqa):
        came = f"the layer is grouped already: {layer.num_kv_heads} key/value heads for {num_heads} heads"
        fail(ValueError, CALL, came, "a multi-head layer was wanted", "pass allow_gqa=True to pool it further")
    wanted = as_kv_heads(CALL, num_kv_heads, num_heads)
    if layer.num_kv_heads % wanted:
        came = f"num_kv_heads is {wanted} for a layer of {layer.num_kv_heads} key/value heads"
        fail(ValueError, CALL, came, "a divisor of these was wanted", f"pass {layer.num_kv_heads} or fewer")
    change = change_layer(CALL, layer, Pooling(wanted, method, groups, head_weights, output == "expanded"))
    pooled = _applied(change, arrays)
    key, value = (
        slots.relative_error(arrays[slots.name], pooled[slots.name]) for slots in (change.layer.key, change.layer.value)
    )
    return AttentionConversion(pooled, num_heads, wanted, layer.head_dim, change.layer.groups, key, value)


def _as_arrays(weights: Any) -> dict[str, Array]:
    if not isinstance(weights, Mapping):
        wanted = "a mapping from name to array was wanted"
        fail(TypeError, CALL, f"weights is {kind(weights)}", wanted, "pass module.state_dict() or a dict")
    return {str(name): as_array(CALL, f"weights[{name!r}]", array) for name, array in weights.items()}


def _read(arrays: Mapping[str, Array], num_heads: int, layout: Any) -> Model:
    infos = {}
    for name, array in arrays.items():
        try:
            infos[name] = TensorInfo(dtype_name(native(array.dtype)), array.shape)
        except ValueError:
            wanted = "float16, bfloat16, float32 or float64 was wanted"
            fail(TypeError, CALL, f"weights[{name!r}] has dtype {array.dtype}", wanted, "pass .astype(np.float32)")
    return read_model(CALL, {}, infos, layout, num_heads)


def _only_layer(model: Model) -> Any:
    if len(model.layers) != 1:
        came = f"weights holds {len(model.layers)} layers"
        fix = "pass those of one, or use convert_checkpoint for a whole model"
        fail(ValueError, CALL, came, "one layer was wanted", fix)
    return model.layers[0]


def _applied(change: LayerChange, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of the result, in the source's order."""
    result = {}
    for name, array in arrays.items():
        mean = change.tensors.get(name)
        if name in change.dropped:
            continue
        if mean is None:
            result[name] = array
            continue
        source = np.concatenate([arrays[part] for part in change.joined[name]]) if name in change.joined else array
        result[name] = np.empty(mean.shape(source.shape), native(array.dtype))
        mean.apply(source, result[name])
    return result
