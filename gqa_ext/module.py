"""Attention as a layer that feels like torch.nn.Module: four projections around scaled_dot_product_attention.

Heads are views of what the projections give, never copies. _projections.py holds the weights and all that is done
with them; _from_mha.py and _from_checkpoint.py make layers of other layers and of files.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ._arguments import as_dropout, as_flag, as_int, as_kv_heads, as_scale, room
from ._from_checkpoint import FromCheckpoint
from ._from_mha import FromMha
from ._layer_arguments import (
    as_alignment,
    as_eps,
    as_head_dim,
    as_head_mask,
    as_inputs,
    as_kv_lengths,
    as_layer_dtype,
    as_layer_mask,
    as_layer_slopes,
    as_rng,
    as_rope,
    constructor_call,
    is_same,
    leading,
)
from ._layer_cache import as_cache, attend, check_fit, num_keys, place
from ._messages import Array
from ._projections import Projections, RMSNorm
from ._rules import as_sinks, as_softcap, as_window
from .cache import KVCache
from .rope import RotaryEmbedding


class GroupedQueryAttention(FromCheckpoint["GroupedQueryAttention"], FromMha["GroupedQueryAttention"], Projections):
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
    rope : RotaryEmbedding, optional
        Turns queries and keys by their positions, after `qk_norm`.
    qk_norm : float, optional
        The eps of an RMSNorm over each head of queries and of keys, before `rope` (Qwen 3). Their weights are the
        parameters ``q_norm.weight`` and ``k_norm.weight``, each (head_dim,) and 1 at first.
    dtype : {'float32', 'float64'}
        Of weights, inputs and outputs. float16 and bfloat16 are not implemented yet, but for what a cache keeps.
    rng : int or numpy.random.Generator, optional
        Seeds dropout and the initial weights: uniform in +-sqrt(6 / (in + out)) for each projection (Glorot and
        Bengio, 2010, what torch.nn.MultiheadAttention does), drawn in the order q, k, v, o; biases are 0.

    Attributes
    ----------
    q_proj, k_proj, v_proj, o_proj : Linear
        ``weight`` (out, in) and ``bias`` (out,) or None, as in torch.nn.Linear.
    q_norm, k_norm : RMSNorm or None
        ``weight`` (head_dim,).
    sinks : ndarray (num_heads,) or None
    training : bool

    Raises
    ------
    ValueError
        A size or number that does not fit.
    TypeError
        An argument of another kind or dtype.
    NotImplementedError
        float16 or bfloat16 as `dtype`.

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
        rope: RotaryEmbedding | None = None,
        qk_norm: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        dtype: DTypeLike = "float32",
        rng: int | np.random.Generator | None = None,
    ) -> None:
        call = type(self).__name__
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
        self.dtype = as_layer_dtype(call, dtype)
        wider = "dtype='float64'"
        self.scale = None if scale is None else as_scale(call, scale, self.dtype, wider)
        self.rope = None if rope is None else as_rope(call, rope, self.head_dim)
        self.qk_norm = None if qk_norm is None else as_eps(call, qk_norm)
        self.window = None if window is None else as_window(call, window)
        self.softcap = None if softcap is None else as_softcap(call, softcap, self.dtype, wider) or None
        self.alibi_slopes = None if alibi_slopes is None else as_layer_slopes(call, alibi_slopes, self.num_heads)
        q_dim, k_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        v_dim, o_dim = self.num_kv_heads * self.v_head_dim, self.num_heads * self.v_head_dim
        super().__init__(
            (q_dim, self.embed_dim), (k_dim, self.kv_embed_dim), (v_dim, self.kv_embed_dim), (self.embed_dim, o_dim),
            bias=self.bias, out_bias=self.out_bias, dtype=self.dtype, rng=self.rng,
            norm=None if self.qk_norm is None else (self.head_dim, self.qk_norm),
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
        causal_alignment: str | None = None,
        kv_lengths: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
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
            No row sees a key behind its own place: row i sees keys 0 to i.
        causal_alignment : {None, 'upper_left', 'lower_right'}
            Where row i stands for `is_causal`, `window` and `alibi_slopes`, as in
            :func:`gqa_ext.scaled_dot_product_attention`: at i, or with 'lower_right' so that the last row belongs to
            the last key that is there. TypeError with a cache, where it always does.
        kv_lengths : array_like of int, (B,) or one int, optional
            How many keys of each sequence are there, from the first; what lies behind them is never seen. With a
            cache: how many of the new ones; the rest is not appended, and rows of `query` behind are padding.
        position_ids : array_like of int (N,) or (B, N), optional
            Where the rows of `query` stand, for `rope` alone: masks and other rules count rows. Keys of the same rows
            (`key` is None, or the same memory) stand there as well. Default: 0 to N - 1, for such keys behind those
            that a cache has. Keys of another sequence stand at 0 to Nk - 1, or behind those of the cache, and the
            query at 0 to N - 1 then, also beside a frozen cache: say where, if it comes in parts.
        cache : KVCache, optional
            Gets the keys and values of this call behind those that it has, and `query` attends to all of them; its
            last row belongs to the last key, and `attn_mask` and weights count all keys. A frozen one gets none:
            the query attends to what is there, for cross-attention. Attention that raises takes its keys back, unless
            they have overwritten others in the ring of a window.
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
            A shape that does not fit, a cache without room, or keys beside a frozen one.
        TypeError
            Another dtype than the layer's: nothing is rounded in silence. A causal_alignment beside a cache.

        Examples
        --------
        A prompt of 10 tokens, and one token more:

        >>> import numpy as np
        >>> from gqa_ext import GroupedQueryAttention, KVCache, RotaryEmbedding
        >>> layer = GroupedQueryAttention(128, 8, 2, rope=RotaryEmbedding(16), rng=0)
        >>> cache = KVCache(1, 2, 16, capacity=100, dtype="float16")
        >>> layer(np.ones((1, 10, 128), np.float32), is_causal=True, cache=cache).shape
        (1, 10, 128)
        >>> layer(np.ones((1, 1, 128), np.float32), cache=cache).shape
        (1, 1, 128)
        """
        call = f"{type(self).__name__}.__call__"
        if cache is not None:
            sizes = (self.num_kv_heads, self.head_dim, self.v_head_dim)
            given = {"key": key, "value": value, "kv_lengths": kv_lengths}
            cache = as_cache(call, cache, sizes, self.dtype, causal_alignment, **given)
        own = key is None or is_same(key, query)
        takes_keys = cache is None or not cache.frozen
        widths = (self.embed_dim, self.kv_embed_dim if takes_keys else self.embed_dim)
        query, key, value = as_inputs(call, query, key, value, widths, self.dtype)
        own = own or is_same(key, query)  # tensors share memory only now
        single = cache is not None and query.ndim == 2
        if single:
            query, key, value = query[None], key[None], value[None]
        if cache is not None:
            check_fit(call, cache, query, key, self.window)
        counts = None if kv_lengths is None else as_kv_lengths(call, kv_lengths, query, key, value)
        heads = None if head_mask is None else as_head_mask(call, head_mask, self.num_heads, self.dtype)
        rows = (*leading(query, key, value), self.num_heads, query.shape[-2])
        rules = self._rules_of_call(call, rows, is_causal, need_weights)
        if attn_mask is not None:
            rules["attn_mask"] = as_layer_mask(call, attn_mask, (*rows, num_keys(cache, key, counts)))
        if cache is None:
            rules["causal_alignment"] = as_alignment(call, causal_alignment, rules["is_causal"], query, key)

        at_query, at_key = place(call, position_ids, query, key, own, self.rope, cache)
        q = self._heads(self.q_proj(query), self.num_heads, self.q_norm, at_query)
        k = self._heads(self.k_proj(key), self.num_kv_heads, self.k_norm, at_key) if takes_keys else None
        v = _split(self.v_proj(value), self.num_kv_heads) if takes_keys else None
        result = attend(call, cache, q, k, v, counts, own, rules)
        out, weights = result if isinstance(result, tuple) else (result, None)
        out = self._joined(out, heads)
        if weights is None:
            return out[0] if single else out
        weights = weights if heads is None else weights * heads[:, None, None]
        return (out[0], weights[0]) if single else (out, weights)

    def _rules_of_call(self, call: str, rows: tuple[int, ...], is_causal: Any, need_weights: Any) -> dict[str, Any]:
        """Keywords of scaled_dot_product_attention for rows (..., num_heads, N)."""
        rules = {name: rule for name, rule in self._rules().items() if rule is not None}
        rules["is_causal"] = as_flag(call, "is_causal", is_causal)
        if as_flag(call, "need_weights", need_weights):
            rules["return_weights"] = True
        if self.training:
            rules |= {"dropout_p": self.dropout, "rng": self.rng}
        if rows[-1] > 1:  # heads side by side, as o_proj wants them
            out = (*rows[:-2], rows[-1], self.num_heads, self.v_head_dim)
            rules["out"] = room(call, "what attention gives", out, self.dtype, "pass fewer rows").swapaxes(-2, -3)
        return rules

    def _joined(self, attended: Array, heads: Array | None) -> Array:
        """What attention gives, (..., num_heads, N, v_head_dim), through the head mask and the output projection."""
        attended = attended.swapaxes(-2, -3)
        if heads is not None:
            attended *= heads[:, None]
        return self.o_proj(attended.reshape(*attended.shape[:-2], self.num_heads * self.v_head_dim))

    def _heads(self, x: Array, num_heads: int, norm: RMSNorm | None, positions: Array | None) -> Array:
        """Queries or keys as attention takes them, (..., num_heads, N, head_dim)."""
        heads = _split(x, num_heads)
        if norm is not None:
            heads = norm(heads)
        return heads if self.rope is None else self.rope(heads, positions)

    def _rules(self) -> dict[str, Any]:
        """What the constructor says of scores, as keywords of scaled_dot_product_attention."""
        return {
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }

    @staticmethod
    def _grouped(*sizes: int, **options: Any) -> "GroupedQueryAttention":
        """What from_checkpoint and from_mha make, of whichever subclass it is called."""
        return GroupedQueryAttention(*sizes, **options)

    def _sizes(self) -> tuple[int, ...]:
        """The positional arguments of the constructor."""
        return self.embed_dim, self.num_heads, self.num_kv_heads

    def __repr__(self) -> str:
        return constructor_call(self, self._sizes())


def _split(x: Array, num_heads: int) -> Array:
    """(..., N, H * D) as (..., H, N, D), a view."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).swapaxes(-2, -3)


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
