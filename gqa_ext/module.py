"""Attention as a layer that feels like torch.nn.Module: four projections around scaled_dot_product_attention.

Heads are views of what the projections give, never copies. _projections.py holds the weights and all that is done
with them, _mha_source.py knows the layers that can be made into grouped ones.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ._arguments import as_dropout, as_flag, as_int, as_kv_heads, as_mask, as_scale, refuse_later
from ._layer_arguments import as_head_dim, as_head_mask, as_inputs, as_layer_dtype, as_layer_slopes, as_rng
from ._messages import Array, fail
from ._mha_source import CALL as FROM_MHA
from ._mha_source import read_mha
from ._projections import Projections
from ._rules import as_sinks, as_softcap, as_window
from .attention import scaled_dot_product_attention
from .convert.methods import pool_heads


class GroupedQueryAttention(Projections):
    """Multi-head attention in which groups of query heads share a key/value head (GQA, arXiv:2305.13245).

    With ``num_kv_heads == num_heads`` it is multi-head, with 1 multi-query attention. Query head h reads key/value
    head ``h // (num_heads // num_kv_heads)``. It starts in eval mode; there is no backward pass.

    Parameters
    ----------
    embed_dim : int
        Length of a query, and of the output.
    num_heads, num_kv_heads : int
        Query heads and key/value heads; the second divides the first.
    head_dim : int, optional
        Of queries and keys. Default ``embed_dim // num_heads``, which must divide.
    v_head_dim : int, optional
        Of values. Default `head_dim`.
    kv_embed_dim : int, optional
        Length of what keys and values are projected from, for cross-attention. Default `embed_dim`.
    bias : bool
        Whether the query, key and value projections have one.
    out_bias : bool, optional
        Whether the output projection has one. Default `bias`.
    dropout : float
        Probability with which each weight becomes 0 in training mode; the others are divided by 1 - dropout.
    scale : float, optional
        Of scores. Default ``1 / sqrt(head_dim)``.
    window : (int or None, int or None), optional
        How many positions before and after its own a row sees; None is open. As `softcap` and `alibi_slopes` in
        :func:`gqa_ext.scaled_dot_product_attention`.
    softcap : float, optional
        Bounds scores smoothly (Gemma 2). None or 0 is off.
    alibi_slopes : array_like (num_heads,) or (B, num_heads), optional
        For ALiBi; see :func:`gqa_ext.get_alibi_slopes`. No parameter: not in the state dict.
    sinks : array_like (num_heads,), optional
        First values of a parameter ``sinks``: one more logit for each row of a head, without a value (gpt-oss).
    rope, qk_norm
        Not implemented yet; only the defaults are taken.
    dtype : {'float32', 'float64'}
        Of weights, inputs and outputs. float16 and bfloat16 are not implemented yet.
    rng : int or numpy.random.Generator, optional
        Seeds dropout and the initial weights: uniform in +-sqrt(6 / (in + out)) for each projection (Glorot and
        Bengio, 2010, what torch.nn.MultiheadAttention does), drawn in the order q, k, v, o; biases are 0.

    Attributes
    ----------
    q_proj, k_proj, v_proj, o_proj : Linear
        ``weight`` (out, in) and ``bias`` (out,) or None, as in torch.nn.Linear.
    sinks : ndarray (num_heads,) or None
    training : bool

    Raises
    ------
    ValueError
        A size or number that does not fit.
    TypeError
        An argument of another kind or dtype.
    NotImplementedError
        A keyword that a later version will take.

    Notes
    -----
    Coming from torch.nn.MultiheadAttention: inputs are ``batch_first``; a bool attn_mask is True where a key may be
    *seen* (there: where it is masked, so pass ``~attn_mask``); a 3-D mask is (num_heads, N, Nk), not
    (batch * num_heads, N, Nk); weights come per head, not averaged, and only when asked for.

    Examples
    --------
    >>> import numpy as np
    >>> from gqa_ext import GroupedQueryAttention
    >>> layer = GroupedQueryAttention(128, 8, 2, rng=0)
    >>> layer
    GroupedQueryAttention(128, 8, 2)
    >>> layer.num_parameters()
    40960
    >>> layer(np.ones((3, 10, 128), np.float32), is_causal=True).shape
    (3, 10, 128)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kv_embed_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        rope: Any = None,
        qk_norm: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        dtype: DTypeLike = "float32",
        rng: int | np.random.Generator | None = None,
    ) -> None:
        call = type(self).__name__
        refuse_later(call, rope=rope, qk_norm=qk_norm)
        self.embed_dim = as_int(call, "embed_dim", embed_dim, 1)
        self.num_heads = as_int(call, "num_heads", num_heads, 1)
        self.num_kv_heads = as_kv_heads(call, num_kv_heads, self.num_heads)
        self.head_dim = as_head_dim(call, head_dim, self.embed_dim, self.num_heads)
        self.v_head_dim = self.head_dim if v_head_dim is None else as_int(call, "v_head_dim", v_head_dim, 1)
        self.kv_embed_dim = self.embed_dim if kv_embed_dim is None else as_int(call, "kv_embed_dim", kv_embed_dim, 1)
        self.bias = as_flag(call, "bias", bias)
        self.out_bias = self.bias if out_bias is None else as_flag(call, "out_bias", out_bias)
        self.dropout = as_dropout(call, "dropout", dropout)
        self.rng = as_rng(call, rng)
        self.scale = None if scale is None else as_scale(call, scale)
        self.window = None if window is None else as_window(call, window)
        self.softcap = None if softcap is None else as_softcap(call, softcap) or None
        self.alibi_slopes = None if alibi_slopes is None else as_layer_slopes(call, alibi_slopes, self.num_heads)
        self.dtype = as_layer_dtype(call, dtype)
        q_dim, k_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        v_dim, o_dim = self.num_kv_heads * self.v_head_dim, self.num_heads * self.v_head_dim
        super().__init__(
            (q_dim, self.embed_dim), (k_dim, self.kv_embed_dim), (v_dim, self.kv_embed_dim), (self.embed_dim, o_dim),
            bias=self.bias, out_bias=self.out_bias, dtype=self.dtype, rng=self.rng,
            sinks=None if sinks is None else as_sinks(call, sinks, self.num_heads),
        )  # fmt: skip

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        attn_mask: ArrayLike | None = None,
        is_causal: bool = False,
        kv_lengths: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        cache: Any = None,
        head_mask: ArrayLike | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Attend from `query` to `key`.

        Parameters
        ----------
        query : array_like (B, N, embed_dim) or (N, embed_dim)
            Of the layer's dtype; numbers that are no array yet (lists) are taken as such.
        key : array_like (B, Nk, kv_embed_dim) or (Nk, kv_embed_dim), optional
            Default `query`. A batch of 1 serves any batch.
        value : array_like, key's shape, optional
            Default `key`.
        attn_mask : array_like, optional
            bool (True = may be seen) or float (added to the scores), broadcasting to (B, num_heads, N, Nk), or
            (num_heads, N, Nk) for inputs without batch.
        is_causal : bool
            Row i sees keys 0 to i.
        kv_lengths : array_like of int, (B,) or one int, optional
            How many keys of each sequence are there, from the first; what lies behind them is never seen.
        position_ids, cache
            Not implemented yet; only None is taken.
        head_mask : array_like (num_heads,), optional
            Multiplies the weights of each head: 0 switches a head off.
        need_weights : bool
            Also return the attention weights; they take memory for N * Nk numbers a head.

        Returns
        -------
        out : ndarray (B, N, embed_dim) or (N, embed_dim)
        weights : ndarray (B, num_heads, N, Nk) or (num_heads, N, Nk)
            Only with `need_weights`: what multiplied the values, dropout included; 0 in masked slots.

        Raises
        ------
        ValueError
            A shape that does not fit.
        TypeError
            Another dtype than the layer's: nothing is rounded in silence.
        NotImplementedError
            A keyword that a later version will take.
        """
        call = f"{type(self).__name__}.__call__"
        refuse_later(call, position_ids=position_ids, cache=cache)
        query, key, value = as_inputs(call, query, key, value, (self.embed_dim, self.kv_embed_dim), self.dtype)
        mask = None if attn_mask is None else as_mask(attn_mask)
        heads = None if head_mask is None else as_head_mask(call, head_mask, self.num_heads, self.dtype)
        causal, weighed = as_flag(call, "is_causal", is_causal), as_flag(call, "need_weights", need_weights)
        rules = self._rules() | {"is_causal": causal, "kv_lengths": kv_lengths, "return_weights": weighed}
        if self.training:
            rules |= {"dropout_p": self.dropout, "rng": self.rng}

        q = _split(self.q_proj(query), self.num_heads)
        k = _split(self.k_proj(key), self.num_kv_heads)
        v = _split(self.v_proj(value), self.num_kv_heads)
        leading = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        attended = np.empty((*leading, query.shape[-2], self.num_heads, self.v_head_dim), self.dtype)
        result = scaled_dot_product_attention(q, k, v, mask, out=attended.swapaxes(-2, -3), **rules)
        if heads is not None:
            attended *= heads[:, None]
        out = self.o_proj(attended.reshape(*attended.shape[:-2], self.num_heads * self.v_head_dim))
        if not weighed:
            return out
        return out, result[1] if heads is None else result[1] * heads[:, None, None]

    def _rules(self) -> dict[str, Any]:
        """What the constructor says of scores, as keywords of scaled_dot_product_attention."""
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }

    @classmethod
    def from_mha(
        cls, source: Any, num_kv_heads: int, *, num_heads: int | None = None, method: str = "mean"
    ) -> "GroupedQueryAttention":
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
            A source that is no such layer, or a number of heads that does not fit it.
        TypeError
            A source or argument of another kind.
        """
        mha = read_mha(source, num_heads)
        number = as_int(FROM_MHA, "num_kv_heads", num_kv_heads, 1)
        if mha.num_kv_heads % number:
            came = f"num_kv_heads is {number} for a source with {mha.num_kv_heads} key/value heads"
            fail(ValueError, FROM_MHA, came, "a divisor of those was wanted", f"pass {mha.num_kv_heads} or a divisor")
        if isinstance(source, GroupedQueryAttention):
            mha.options.update(source._rules(), dropout=source.dropout)
        layer = GroupedQueryAttention(mha.embed_dim, mha.num_heads, number, **mha.options)
        pooled = {
            name: pool_heads(array, mha.num_kv_heads, number, method=method) if name[0] in "kv" else array
            for name, array in mha.state.items()
        }
        layer.load_state_dict(pooled)
        return layer

    def _sizes(self) -> tuple[int, ...]:
        """The positional arguments of the constructor."""
        return self.embed_dim, self.num_heads, self.num_kv_heads

    def __repr__(self) -> str:
        head_dim = self.embed_dim // self.num_heads if self.embed_dim % self.num_heads == 0 else None
        options = {
            "head_dim": (self.head_dim, head_dim),
            "v_head_dim": (self.v_head_dim, self.head_dim),
            "kv_embed_dim": (self.kv_embed_dim, self.embed_dim),
            "bias": (self.bias, False),
            "out_bias": (self.out_bias, self.bias),
            "dropout": (self.dropout, 0.0),
            "scale": (self.scale, None),
            "window": (self.window, None),
            "softcap": (self.softcap, None),
            "alibi_slopes": (_numbers(self.alibi_slopes), None),
            "sinks": (_numbers(self.sinks), None),
            "dtype": (self.dtype.name, "float32"),
        }
        given = [f"{name}={setting!r}" for name, (setting, default) in options.items() if setting != default]
        return f"{type(self).__name__}({', '.join([*map(repr, self._sizes()), *given])})"


def _split(x: Array, num_heads: int) -> Array:
    """(..., N, H * D) as (..., H, N, D), a view."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).swapaxes(-2, -3)


def _numbers(array: Array | None) -> list[Any] | None:
    """The array as nested lists that are as short as its dtype allows, for repr."""
    if array is None:
        return None
    return [float(str(item)) if item.ndim == 0 else _numbers(item) for item in array]


class MultiHeadAttention(GroupedQueryAttention):
    """As many key/value heads as query heads: :class:`GroupedQueryAttention` (embed_dim, num_heads, num_heads).

    Examples
    --------
    >>> from gqa_ext import MultiHeadAttention
    >>> MultiHeadAttention(128, 8, bias=True).num_parameters()  # what torch.nn.MultiheadAttention(128, 8) has
    66048
    """

    def __init__(self, embed_dim: int, num_heads: int, **kw: Any) -> None:
        super().__init__(embed_dim, num_heads, num_heads, **kw)

    def _sizes(self) -> tuple[int, ...]:
        return self.embed_dim, self.num_heads


class MultiQueryAttention(GroupedQueryAttention):
    """One key/value head for all query heads (Shazeer, arXiv:1911.02150): GroupedQueryAttention (…, 1).

    Examples
    --------
    >>> from gqa_ext import MultiQueryAttention
    >>> MultiQueryAttention(128, 8).k_proj.weight.shape
    (16, 128)
    """

    def __init__(self, embed_dim: int, num_heads: int, **kw: Any) -> None:
        super().__init__(embed_dim, num_heads, 1, **kw)

    def _sizes(self) -> tuple[int, ...]:
        return self.embed_dim, self.num_heads
