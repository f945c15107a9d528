"""State dicts: every name an attention layer's weights go by, torch tensors, and what does not fit.

A state dict maps names to arrays. Ours are ``q_proj.weight`` (out, in), ``q_proj.bias`` and so on for k, v and
o, and ``q_norm.weight`` and ``k_norm.weight`` (head_dim,) where heads are normed. Taken as well: ``out_proj`` for
``o_proj``, and torch.nn.MultiheadAttention's ``in_proj_weight`` and ``in_proj_bias`` (q, k and v stacked) or
``q_proj_weight``. torch is never imported; its tensors are known by their methods.

Called by _projections.py and _from_mha.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ._messages import Array, fail, kind, native

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
STACKED = PROJECTIONS[:3]
NORMS = ("q_norm", "k_norm")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict`` returns, as torch's: the names that ``strict=False`` let pass."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class State(NamedTuple):
    """A state dict under our names, and what could not be brought under them."""

    arrays: dict[str, Array]
    given: dict[str, str]  # our name: the name it came under
    uncut: dict[str, str]  # a stacked tensor that cannot be cut into q, k and v: why not
    twice: list[str]


def as_state(call: str, state_dict: Any, prefix: str = "") -> dict[str, Array]:
    """The entries whose names begin with ``prefix``, without it, as arrays of real numbers."""
    if not isinstance(state_dict, Mapping):
        wanted = "a dict of names to arrays was wanted"
        fail(TypeError, call, f"state_dict is {kind(state_dict)}", wanted, "pass module.state_dict()")
    return {
        str(name).removeprefix(prefix): as_parameter(call, str(name), tensor)
        for name, tensor in state_dict.items()
        if str(name).startswith(prefix)
    }


def as_parameter(call: str, name: str, tensor: Any) -> Array:
    """An array or a torch tensor as an ndarray of real numbers."""
    wanted, fix = "an array of real numbers was wanted", f"convert {name} with np.asarray(..., np.float32)"
    if isinstance(tensor, np.ma.MaskedArray):
        fail(TypeError, call, f"{name} is a masked array", wanted, f"pass {name}.filled(0)")
    try:
        array = np.asarray(_from_torch(tensor) if hasattr(tensor, "detach") else tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        fail(TypeError, call, f"{name} is {kind(tensor)} that NumPy cannot read ({error})", wanted, fix)
    if array.dtype.kind not in "biuf" and native(array.dtype) != _BFLOAT16:
        came = f"{name} is {kind(tensor)}" if array.dtype == object else f"{name} has dtype {array.dtype}"
        fail(TypeError, call, came, wanted, fix)
    return array


def _from_torch(tensor: Any) -> Any:
    """A tensor's numbers, with or without requires_grad; dtypes that NumPy lacks come as float32."""
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.float().numpy()


def translate(arrays: Mapping[str, Array], rows: tuple[int, int, int] | None) -> State:
    """Bring the names to ours; ``rows`` of q, k and v say where a stacked tensor is cut, None in thirds."""
    state = State({}, {}, {}, [])
    for given, array in arrays.items():
        for name, part in _parts(given, array, rows, state.uncut):
            if name in state.arrays:
                state.twice.append(f"{name} (as {state.given[name]} and {given})")
            state.arrays[name] = part
            state.given[name] = given
    return state


def _parts(
    given: str, array: Array, rows: tuple[int, int, int] | None, uncut: dict[str, str]
) -> Iterator[tuple[str, Array]]:
    """What one entry holds, under our names."""
    if given in ("in_proj_weight", "in_proj_bias"):
        length = array.shape[0] if array.ndim else 0
        heights = rows or (length // 3,) * 3
        if array.ndim and sum(heights) == length:
            cuts = np.cumsum(heights)[:2].tolist()
            yield from zip(_stacked_names(given), np.split(array, cuts), strict=True)
        else:
            uncut[given] = f"{given} {array.shape} where {sum(heights)} rows were wanted"
    elif given in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        yield given.replace("_weight", ".weight"), array
    else:
        yield (given.replace("out_proj.", "o_proj.") if given.startswith("out_proj.") else given), array


def _stacked_names(given: str) -> list[str]:
    """What in_proj_weight or in_proj_bias holds."""
    return [f"{name}.{given.removeprefix('in_proj_')}" for name in STACKED]


def check_fit(
    call: str, state: State, wanted: Mapping[str, tuple[int, ...]], *, strict: bool, hint: str
) -> IncompatibleKeys:
    """Raise one ValueError that lists all that does not fit; ``hint`` is the fix where q, k or v do not."""
    there = set(state.arrays).union(*(_stacked_names(given) for given in state.uncut))
    missing = [name for name in wanted if name not in there]
    names = [(name, given) for name, given in state.given.items()]
    names += [(name, given) for given in state.uncut for name in _stacked_names(given)]
    unexpected = list(dict.fromkeys(given for name, given in names if name not in wanted))
    misshaped = [why for given, why in state.uncut.items() if given not in unexpected]
    for name, shape in wanted.items():
        if name in state.arrays and state.arrays[name].shape != shape:
            misshaped.append(f"{state.given[name]} {state.arrays[name].shape} where {shape} was wanted")
    problems = {"repeats": state.twice, "has misshaped": misshaped}
    if strict:
        problems = {"lacks": missing, "has unexpected": unexpected} | problems
    came = listed(problems)
    if came:
        about_heads = any(line.startswith(("k_proj", "v_proj", "in_proj")) for line in misshaped)
        fix = hint if about_heads and hint else "compare with module.state_dict()"
        fail(ValueError, call, f"state_dict {came}", f"{', '.join(wanted)} were wanted and nothing was loaded", fix)
    return IncompatibleKeys(missing, unexpected)


def listed(problems: Mapping[str, list[str]]) -> str:
    """``lacks q_proj.weight; has unexpected a, b``."""
    return "; ".join(f"{what} {', '.join(names)}" for what, names in problems.items() if names)
