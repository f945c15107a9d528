"""Any multi-head layer as a configuration and weights, and a grouped layer from it by pooling.

It starts from the layer's own module class, a torch.nn.MultiheadAttention (known by its attributes, torch is never
imported), any other object with a ``state_dict()``, or a state dict. Base class of module.py's.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from ._arguments import as_int, rounded
from ._messages import Array, fail, kind
from ._state import NORMS, PROJECTIONS, STACKED, State, as_state, listed, translate
from .convert.methods import check_method, pool_heads

CALL = "GroupedQueryAttention.from_mha"
_TORCH_MHA = ("in_proj_weight", "out_proj", "bias_k", "bias_v", "add_zero_attn", "kdim", "vdim", "dropout")

T = TypeVar("T")


class FromMha(Generic[T]):
    """Gives a class `from_mha`, which makes a T."""

    _grouped: ClassVar[Callable[..., Any]]

    @classmethod
    def from_mha(cls, source: Any, num_kv_heads: int, *, num_heads: int | None = None, method: str = "mean") -> T:
        """A layer with fewer key/value heads from a multi-head one, by pooling (arXiv:2305.13245).

        Parameters
        ----------
        source : GroupedQueryAttention, torch.nn.MultiheadAttention, or mapping of str to array
            Or anything else with a ``state_dict()``; names as in :meth:`load_state_dict`.
        num_kv_heads : int
            Key/value heads wanted; divides the source's.
        num_heads : int, optional
            Query heads of the source; needed where it does not say.
        method : {'mean', 'first'}
            As in :func:`gqa_ext.convert.pool_heads`.

        Returns
        -------
        GroupedQueryAttention
            With copies of the query and output projections; float64 if one of the source's arrays is, else
            float32 (half precision is widened before pooling). Biases that only some of q, k and v have are
            zeros in the others.

        Raises
        ------
        ValueError
            A source that is no such layer, a number of heads that does not fit it, or another method.
        TypeError
            A source or argument of another kind.
        """
        check_method(method, None, CALL)
        mha = read_mha(source, num_heads)
        number = as_int(CALL, "num_kv_heads", num_kv_heads, 1)
        if mha.num_kv_heads % number:
            came = f"num_kv_heads is {number} for a source with {mha.num_kv_heads} key/value heads"
            fail(ValueError, CALL, came, "a divisor of those was wanted", f"pass {mha.num_kv_heads} or a divisor")
        if isinstance(source, FromMha):
            own: Any = source
            mha.options.update(own._rules(), dropout=own.dropout, rope=own.rope, qk_norm=own.qk_norm)
        made: T = cls._grouped(mha.embed_dim, mha.num_heads, number, **mha.options)
        pooled = {
            name: pool_heads(array, mha.num_kv_heads, number, method=method)
            for name, array in mha.state.items()
            if name.startswith(("k_proj", "v_proj"))
        }
        made.load_state_dict(mha.state | pooled)  # type: ignore[attr-defined]
        return made


class MhaSource(NamedTuple):
    """A layer in numbers."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    options: dict[str, Any]  # the keywords of GroupedQueryAttention
    state: dict[str, Array]  # under our names


def read_mha(source: Any, num_heads: int | None) -> MhaSource:
    """The source in numbers; ValueError for what a GroupedQueryAttention cannot express."""
    options: dict[str, Any] = {}
    norms = NORMS if getattr(source, "qk_norm", None) is not None else ()  # a state dict does not say their eps
    if all(hasattr(source, name) for name in _TORCH_MHA):
        options = _torch_options(source)
    if not isinstance(source, Mapping) and hasattr(source, "state_dict"):
        num_heads = _agreed_heads(num_heads, getattr(source, "num_heads", None))
        source = source.state_dict()
    elif not isinstance(source, Mapping):
        wanted = "a module, a torch.nn.MultiheadAttention or a state dict was wanted"
        fail(TypeError, CALL, f"source is {kind(source)}", wanted, "pass module.state_dict() and num_heads")
    if num_heads is None:
        wanted = "a state dict does not say how many heads it has"
        fail(ValueError, CALL, "num_heads is None", wanted, "pass num_heads=")
    state = translate(as_state(CALL, source), None)
    _check_names(state, norms)
    return _measure(state.arrays, as_int(CALL, "num_heads", num_heads, 1), options)


def _torch_options(source: Any) -> dict[str, Any]:
    """What torch.nn.MultiheadAttention knows beside its weights."""
    if source.bias_k is not None or source.bias_v is not None or source.add_zero_attn:
        wanted = "a layer without extra keys was wanted"
        fix = "build it with add_bias_kv=False and add_zero_attn=False"
        fail(ValueError, CALL, "source has add_bias_kv or add_zero_attn", wanted, fix)
    if source.kdim != source.vdim:
        came = f"source has kdim {source.kdim} and vdim {source.vdim}"
        fail(ValueError, CALL, came, "equal ones were wanted", "project one of them first")
    return {"dropout": source.dropout}


def _agreed_heads(asked: int | None, known: Any) -> int | None:
    """num_heads from the argument, from the source, or both if they agree."""
    if asked is not None and known is not None and asked != known:
        came, wanted = f"num_heads is {asked} but source has {known}", "the same number was wanted"
        fail(ValueError, CALL, came, wanted, "leave num_heads out")
    return known if asked is None else asked


def _check_names(state: State, norms: tuple[str, ...]) -> None:
    """All four weights and those of the norms, maybe biases and sinks, nothing else, and each once."""
    weights = [f"{name}.weight" for name in (*PROJECTIONS, *norms)]
    missing = [name for name in weights if name not in state.arrays]
    known = {*weights, *(f"{name}.bias" for name in PROJECTIONS), "sinks"}
    unexpected = [state.given[name] for name in state.arrays if name not in known]
    given = [(name, array.ndim) for name, array in state.arrays.items() if name in known]
    bad = [name for name, ndim in given if ndim != 1 + name.endswith("proj.weight")]
    problems = {
        "lacks": missing,
        "has unexpected": unexpected,
        "repeats": state.twice,
        "has misshaped": [*state.uncut.values(), *(f"{state.given[name]} {state.arrays[name].shape}" for name in bad)],
    }
    came = listed(problems)
    if came:
        wanted = f"{', '.join(weights)} (out, in) were wanted, with or without biases (out,)"
        fix = "select one layer's entries and strip what stands before these names"
        fail(ValueError, CALL, f"source {came}", wanted, fix)


def _measure(state: dict[str, Array], num_heads: int, options: dict[str, Any]) -> MhaSource:
    """Read the configuration off the shapes."""
    (q_rows, embed_dim), (k_rows, kv_embed_dim), (v_rows, v_columns), (o_rows, o_columns) = (
        state[f"{name}.weight"].shape for name in PROJECTIONS
    )
    head_dim = q_rows // num_heads
    num_kv_heads = k_rows // head_dim if head_dim else 0
    v_head_dim = v_rows // num_kv_heads if num_kv_heads else 0
    fits = (
        q_rows == num_heads * head_dim,
        num_kv_heads and k_rows == num_kv_heads * head_dim and num_heads % num_kv_heads == 0,
        v_head_dim and v_rows == num_kv_heads * v_head_dim and v_columns == kv_embed_dim,
        o_columns == num_heads * v_head_dim and o_rows == embed_dim,
    )
    heights = zip(PROJECTIONS, (q_rows, k_rows, v_rows, o_rows), strict=True)
    odd = [f"{name}.bias" for name, rows in heights if len(state.get(f"{name}.bias", range(rows))) != rows]
    odd += [] if len(state.get("sinks", range(num_heads))) == num_heads else ["sinks"]
    if not all(fits) or odd:
        came = ", ".join(f"{name} {array.shape}" for name, array in state.items())
        wanted = f"heads of one size for num_heads {num_heads} were wanted, and o_proj back to q_proj's input"
        fail(ValueError, CALL, f"source has {came}", wanted, "check num_heads and that weights are (out, in)")
    dtype = np.dtype(np.float64 if any(array.dtype == np.float64 for array in state.values()) else np.float32)
    fix = "pass float64 weights"  # NumPy's longdouble holds more than float32
    arrays = {n: array if array.dtype == dtype else rounded(CALL, n, array, dtype, fix) for n, array in state.items()}
    bias = any(f"{name}.bias" in state for name in STACKED)
    if bias:  # Whisper has none for keys, which is the same as zeros
        for name, rows in zip(STACKED, (q_rows, k_rows, v_rows), strict=True):
            arrays.setdefault(f"{name}.bias", np.zeros(rows, dtype))
    measured = {"head_dim": head_dim, "v_head_dim": v_head_dim, "kv_embed_dim": kv_embed_dim}
    measured |= {"bias": bias, "out_bias": "o_proj.bias" in state, "sinks": arrays.get("sinks")}
    measured["dtype"] = dtype.name
    return MhaSource(embed_dim, num_heads, num_kv_heads, options | measured, arrays)
