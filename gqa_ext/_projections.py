"""The projections and norms of an attention layer, and what torch.nn.Module does with weights.

The matrix products are NumPy's, hence BLAS. _state.py knows the names that weights come under.
Called by module.py.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from ._arguments import as_flag, as_str, room, rounded
from ._messages import Array, fail, short
from ._state import NORMS, PROJECTIONS, STACKED, IncompatibleKeys, as_state, check_fit, translate


class Linear:
    """``x @ weight.T + bias``, laid out as torch.nn.Linear.

    Parameters
    ----------
    out_features, in_features : int
    bias : bool
        Without one, :attr:`bias` is None.
    dtype : float32 or float64
    rng : numpy.random.Generator
        Draws the weight uniformly from +-sqrt(6 / (in + out)) (Glorot and Bengio, 2010), always in float64, so that
        one seed means one module in any dtype. The bias starts at 0.

    Attributes
    ----------
    weight : ndarray (out_features, in_features)
    bias : ndarray (out_features,) or None
    """

    __slots__ = ("bias", "weight")

    def __init__(
        self, out_features: int, in_features: int, *, bias: bool, dtype: np.dtype[Any], rng: np.random.Generator
    ) -> None:
        bound = math.sqrt(6 / (in_features + out_features))
        self.weight: Array = rng.uniform(-bound, bound, (out_features, in_features)).astype(dtype)
        self.bias: Array | None = np.zeros(out_features, dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        """(..., in_features) to (..., out_features), as one product."""
        y = x.reshape(-1, x.shape[-1]) @ self.weight.T
        if self.bias is not None:
            y += self.bias
        return y.reshape(*x.shape[:-1], len(self.weight))

    def __repr__(self) -> str:
        rows, columns = self.weight.shape
        return f"Linear({columns} -> {rows}, bias={self.bias is not None}, dtype={str(self.weight.dtype)!r})"


class RMSNorm:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension (arXiv:1910.07467), one weight for all heads.

    Parameters
    ----------
    size : int
    eps : float
    dtype : float32 or float64

    Attributes
    ----------
    weight : ndarray (size,)
        Starts at 1.
    eps : float
    """

    __slots__ = ("eps", "weight")

    def __init__(self, size: int, eps: float, dtype: np.dtype[Any]) -> None:
        self.weight: Array = np.ones(size, dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """(..., size), of which each row is normed."""
        squares: Array = np.einsum("...i,...i->...", x, x)[..., None]
        normed: Array = x / np.sqrt(squares / len(self.weight) + self.eps) * self.weight
        return normed

    def __repr__(self) -> str:
        return f"RMSNorm({len(self.weight)}, eps={self.eps}, dtype={str(self.weight.dtype)!r})"


class Projections:
    """q_proj, k_proj, v_proj and o_proj, each of shape (out, in), and norms and sinks if wanted; starts in eval mode.

    ``norm`` is None, or the size and eps of q_norm and k_norm.
    """

    def __init__(
        self,
        *shapes: tuple[int, int],
        bias: bool,
        out_bias: bool,
        norm: tuple[int, float] | None,
        sinks: Array | None,
        dtype: np.dtype[Any],
        rng: np.random.Generator,
    ) -> None:
        for name, shape in zip(PROJECTIONS, shapes, strict=True):  # before anything is drawn, in float64
            fix = "pass fewer or smaller heads, or a smaller embed_dim"
            room(type(self).__name__, f"{name}.weight", shape, np.float64, fix)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(*shape, bias=has_bias, dtype=dtype, rng=rng)
            for shape, has_bias in zip(shapes, (bias, bias, bias, out_bias), strict=True)
        )
        self.q_norm, self.k_norm = (None if norm is None else RMSNorm(*norm, dtype) for _ in NORMS)
        self.sinks = None if sinks is None else rounded(type(self).__name__, "sinks", sinks, dtype)
        self.training = False

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """Name and array of each weight and bias: q, k, v, o, q_norm, k_norm, sinks; the arrays are the layer's own."""
        for name in PROJECTIONS:
            projection: Linear = getattr(self, name)
            yield f"{name}.weight", projection.weight
            if projection.bias is not None:
                yield f"{name}.bias", projection.bias
        for name in NORMS:
            norm: RMSNorm | None = getattr(self, name)
            if norm is not None:
                yield f"{name}.weight", norm.weight
        if self.sinks is not None:
            yield "sinks", self.sinks

    def parameters(self) -> Iterator[Array]:
        """The arrays of :meth:`named_parameters`."""
        return (array for _, array in self.named_parameters())

    def num_parameters(self) -> int:
        """How many numbers the layer has learnt."""
        return sum(array.size for array in self.parameters())

    def state_dict(self, prefix: str = "", *, out_name: str = "o_proj") -> dict[str, Array]:
        """Names and arrays, laid out as torch does.

        Parameters
        ----------
        prefix : str
            Goes before each name, for instance "model.layers.0.self_attn.".
        out_name : str
            What the output projection is called: "o_proj" or "out_proj".

        Returns
        -------
        dict of str to ndarray
            ``q_proj.weight`` (out, in), ``q_proj.bias`` and so on. As in torch the arrays are the layer's own:
            copy them to keep them. torch takes ``{name: torch.from_numpy(a) for name, a in ...}``.

        Raises
        ------
        ValueError, TypeError
            Another `out_name`; a `prefix` that is no str.
        """
        call = f"{type(self).__name__}.state_dict"
        prefix = as_str(call, "prefix", prefix, "pass prefix='' for none")
        if as_str(call, "out_name", out_name, "leave it out") not in ("o_proj", "out_proj"):
            wanted = "'o_proj' or 'out_proj' was wanted"
            fail(ValueError, call, f"out_name is {short(out_name)}", wanted, "rename the entry afterwards")
        return {prefix + name.replace("o_proj.", f"{out_name}."): array for name, array in self.named_parameters()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, prefix: str = ""
    ) -> IncompatibleKeys:
        """Copy weights in, all or nothing.

        Parameters
        ----------
        state_dict : mapping of str to array_like or torch CPU tensor
            Under our names, with ``out_proj`` for ``o_proj``, or as torch.nn.MultiheadAttention names them
            (``in_proj_weight``, ``in_proj_bias``, or ``q_proj_weight`` and so on). Any real dtype; numbers are
            rounded to the layer's.
        strict : bool
            False lets missing and unexpected names pass, never shapes.
        prefix : str
            Only names that begin so are read, and read without it.

        Returns
        -------
        IncompatibleKeys
            ``missing_keys`` and ``unexpected_keys``, both empty when strict.

        Raises
        ------
        ValueError
            One that lists all missing, unexpected and misshaped names, or names a tensor with a finite number that
            the layer's dtype makes infinite; the layer is then as before.
        TypeError
            No mapping, an entry that is no array of real numbers, or a `prefix` that is no str.
        """
        call = f"{type(self).__name__}.load_state_dict"
        prefix = as_str(call, "prefix", prefix, "pass prefix='' for none")
        strict = as_flag(call, "strict", strict)
        q, k, v = (len(getattr(self, name).weight) for name in STACKED)
        state = translate(as_state(call, state_dict, prefix), (q, k, v))
        own = dict(self.named_parameters())
        hint = "GroupedQueryAttention.from_mha(state_dict, num_kv_heads, num_heads=...) pools multi-head weights"
        left = check_fit(call, state, {name: array.shape for name, array in own.items()}, strict=strict, hint=hint)
        fix = "build the layer with dtype='float64', or mend the weights; nothing was loaded"
        fresh = {
            name: rounded(call, f"{prefix}{state.given[name]}", state.arrays[name], array.dtype, fix)
            for name, array in own.items()
            if name in state.arrays
        }
        for name, array in fresh.items():
            own[name][...] = array
        return left

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, which switches dropout on; returns the layer."""
        self.training = as_flag(f"{type(self).__name__}.train", "mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode, in which a layer starts; returns the layer."""
        return self.train(False)
