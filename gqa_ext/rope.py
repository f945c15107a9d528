"""Rotary position embedding, with every scaling that Hugging Face's configurations name.

_rope_scaling.py reads the dict; csrc/rope.c turns. A call for one token costs a few microseconds: the frequencies
are made once, and an argument that is already as C takes it is not touched.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arguments import as_array, as_flag, as_int, as_out, clashes
from ._checks import check_out
from ._messages import ROPE, Array, fail
from ._rope_scaling import CALL, Frequencies, frequencies, read_settings
from ._rules import as_integers

_INT64 = np.dtype(np.int64)


class RotaryEmbedding:
    """Turn each pair of a head's elements by an angle that grows with its position (RoPE, arXiv:2104.09864).

    Pair i turns by position * base ** (-2 i / rotary_dim), where an odd share of the head that partial_rotary_factor
    gives counts as it is, though the last pair is whole. Angles are computed in float64, so that a position of a
    million is still right, and a result is rounded once.

    Parameters
    ----------
    head_dim : int
    base : float, optional
        Default: the dict's ``rope_theta``, else 10000.
    rotary_dim : int, optional
        How many elements of a head are turned, from the first; even. Default: the dict's ``partial_rotary_factor``
        of `head_dim`, else all.
    interleaved : bool
        Pairs are neighbours (2 i, 2 i + 1), as in GPT-J and the paper. Default: (i, i + rotary_dim / 2), as in
        Llama and most others ("rotate half").
    scaling : mapping, optional
        Hugging Face's flat dict as it stands, ``config.rope_parameters`` (in older files ``rope_scaling``). Types:
        default, linear, dynamic, yarn, longrope and llama3, with the meaning that transformers gives them.
    max_position_embeddings : int, optional
        The model's. Needed by dynamic; by yarn and longrope where ``factor`` is missing; elsewhere the default of
        ``original_max_position_embeddings``.

    Attributes
    ----------
    head_dim, rotary_dim : int
    base : float
    interleaved : bool
    scaling : dict or None
    max_position_embeddings : int or None

    Raises
    ------
    ValueError
        A number out of range; an unknown ``rope_type`` (the known are listed) or key; something missing, or said
        twice and differently; a dict with one dict for each layer type.
    TypeError
        An argument of another kind.

    Notes
    -----
    dynamic and longrope choose frequencies for each call from its largest position, as transformers does: a key
    that was turned in an earlier call keeps what it got then.

    Examples
    --------
    >>> import numpy as np
    >>> from gqa_ext import RotaryEmbedding
    >>> rope = RotaryEmbedding(64, scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0})
    >>> rope
    RotaryEmbedding(64, scaling={'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500000.0})
    >>> query = np.ones((1, 8, 5, 64), np.float32)
    >>> rope(query).shape
    (1, 8, 5, 64)

    One new token at position 5:

    >>> rope(query[:, :, :1], np.array([5])).shape
    (1, 8, 1, 64)
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        self.head_dim = as_int(CALL, "head_dim", head_dim, 2)
        self.interleaved = as_flag(CALL, "interleaved", interleaved)
        settings = read_settings(self.head_dim, base, rotary_dim, scaling, max_position_embeddings)
        self.base, self.rotary_dim = settings.base, 2 * settings.pairs
        self.scaling = None if scaling is None else dict(scaling)
        self.max_position_embeddings: int | None = settings.given.get("max_position_embeddings")
        options: dict[str, Any] = {
            "base": None if base is None else settings.base,
            "rotary_dim": rotary_dim,
            "interleaved": self.interleaved or None,
        }
        options |= {"scaling": self.scaling, "max_position_embeddings": max_position_embeddings}
        self._options = {name: setting for name, setting in options.items() if setting is not None}
        self._frequencies = frequencies(settings)

    def __call__(self, x: ArrayLike, positions: ArrayLike | None = None, *, out: Array | None = None) -> Array:
        """Turn the rows of `x`.

        Parameters
        ----------
        x : array_like (..., H, S, head_dim) or (S, head_dim), float16, bfloat16, float32 or float64
            Queries or keys; any strides and byte order are read in place.
        positions : array_like of int (S,) or (B, S), optional
            Of each row; (B, S) broadcasts to the dimensions before H, and S. Any integers. Default 0 to S - 1.
        out : ndarray, optional
            Where to write: x's shape and dtype, any strides. May be `x` itself; any other overlap goes through a
            temporary.

        Returns
        -------
        ndarray, x's shape and dtype
            `out`, or a new array, C-contiguous and of native byte order.

        Raises
        ------
        ValueError
            A shape that does not fit, or an `out` that is read-only or shares memory with itself.
        TypeError
            Another dtype.
        """
        if type(x) is not ndarray:
            x = as_array(ROPE, "x", x)
        if positions is not None:
            positions = _as_positions(ROPE, positions)
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            wanted = f"(..., heads, sequence, {self.head_dim}) was wanted"
            fix = f"pass other heads, or build it as RotaryEmbedding({x.shape[-1]})" if x.ndim > 1 else "pass x[None]"
            fail(ValueError, ROPE, f"x has shape {x.shape}", wanted, fix)
        table, scale = self._choose(positions, x.shape[-2])
        if out is None:
            return _core.rope(x, positions, table, scale, self.interleaved, None)
        target = as_out(out, ROPE)
        clash = clashes(target, x, positions)
        fresh = _core.rope(x, positions, table, scale, self.interleaved, None if clash else target)
        if clash:
            check_out(target, fresh.shape, x, ROPE, "x")
            target[...] = fresh
        return out

    def cos_sin(self, positions: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine of each angle, times the scale that yarn and longrope give a turned pair.

        Parameters
        ----------
        positions : array_like of int (..., S)

        Returns
        -------
        cos, sin : ndarray (..., S, rotary_dim / 2), float32

        Raises
        ------
        TypeError
            No array of integers.

        Examples
        --------
        >>> from gqa_ext import RotaryEmbedding
        >>> cos, sin = RotaryEmbedding(4).cos_sin([0, 1])
        >>> cos.round(4)
        array([[1.    , 1.    ],
               [0.5403, 1.    ]], dtype=float32)
        """
        given = _as_positions(f"{CALL}.cos_sin", positions)
        table, scale = self._choose(given, 0)
        half = self.rotary_dim // 2
        unit = np.repeat(np.array([1, 0], np.float32), half)  # pairs (1, 0), which turn into (cos, sin)
        rows = np.broadcast_to(unit, (given.size, 2 * half))
        turned = _core.rope(rows, given.reshape(-1), table, scale, False, None).reshape(*given.shape, 2 * half)
        return np.ascontiguousarray(turned[..., :half]), np.ascontiguousarray(turned[..., half:])

    def _choose(self, positions: Array | None, length: int) -> Frequencies:
        """Those of this call: dynamic and longrope look at its largest position, or at the length without any."""
        if isinstance(self._frequencies, Frequencies):
            return self._frequencies
        return self._frequencies(length if positions is None else int(positions.max(initial=-1)) + 1)

    def __repr__(self) -> str:
        given = [f"{name}={setting!r}" for name, setting in self._options.items()]
        return f"{CALL}({', '.join([str(self.head_dim), *given])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _build, (self.head_dim, self._options)


def _build(head_dim: int, options: dict[str, Any]) -> RotaryEmbedding:
    """What pickle and copy call."""
    return RotaryEmbedding(head_dim, **options)


def _as_positions(call: str, thing: Any) -> Array:
    """int64 of native byte order; an array that is so already is taken as it lies."""
    if type(thing) is ndarray and thing.dtype is _INT64:
        return thing
    return as_integers(call, "positions", thing)
