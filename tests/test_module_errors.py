"""Every wrong argument of the layer is refused under the layer's name, with what came, what was wanted and the fix."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gqa_ext
from gqa_ext import GroupedQueryAttention


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def build(*sizes: int, **options: Any) -> GroupedQueryAttention:
    return GroupedQueryAttention(*sizes, rng=0, **options)


CONSTRUCTORS = [
    (ValueError, r"embed_dim is 10 for num_heads 4; a multiple", (10, 4, 2), {}),
    (ValueError, r"num_kv_heads is 3 for num_heads 8; a divisor .*1, 2, 4, 8", (128, 8, 3), {}),
    (ValueError, r"num_kv_heads is 16 for num_heads 8", (128, 8, 16), {}),
    (ValueError, r"embed_dim is 0", (0, 8, 2), {}),
    (ValueError, r"num_heads is -8", (128, -8, 2), {}),
    (TypeError, r"num_heads is .*a float", (128, 8.0, 2), {}),
    (TypeError, r"num_kv_heads is a numpy.ndarray; an int", (128, 8, np.array([2, 2])), {}),
    (ValueError, r"head_dim is 0", (128, 8, 2), {"head_dim": 0}),
    (TypeError, r"v_head_dim is .*a str", (128, 8, 2), {"v_head_dim": "16"}),
    (ValueError, r"kv_embed_dim is -1", (128, 8, 2), {"kv_embed_dim": -1}),
    (TypeError, r"bias is 1", (128, 8, 2), {"bias": 1}),
    (ValueError, r"scale is nan", (128, 8, 2), {"scale": float("nan")}),
    (TypeError, r"scale is .*a str", (128, 8, 2), {"scale": "1"}),
    (ValueError, r"scale is 1e\+40; 0 or a size .*: pass dtype='float64'", (128, 8, 2), {"scale": 1e40}),
    (ValueError, r"dropout is 1.5", (128, 8, 2), {"dropout": 1.5}),
    (TypeError, r"dtype is int8", (128, 8, 2), {"dtype": "int8"}),
    (TypeError, r"dtype is ", (128, 8, 2), {"dtype": "float31"}),
    (TypeError, r"rng is .*a str", (128, 8, 2), {"rng": "seed"}),
    (ValueError, r"rng is ", (128, 8, 2), {"rng": -1}),
    (MemoryError, r"q_proj.weight would have shape \(1099511627776, 1099511627776\); an array", (2**40, 8, 2), {}),
    (MemoryError, r"q_proj.weight would have shape \(1000000000, 1000000000\)", (10**9, 8, 2), {}),
    (MemoryError, r"v_proj.weight would have shape \(2417851639229258349412352, 8\)", (8, 8, 2), {"v_head_dim": 2**80}),
    (ValueError, r"sinks has 1e\+300; numbers that float32 holds were", (128, 8, 2), {"sinks": [0.0] * 7 + [1e300]}),
    (TypeError, r"dtype is None; a dtype was wanted: pass dtype='float32' or 'float64'$", (128, 8, 2), {"dtype": None}),
    (NotImplementedError, r"dtype is float16", (128, 8, 2), {"dtype": "float16"}),
    (NotImplementedError, r"dtype is bfloat16", (128, 8, 2), {"dtype": "bfloat16"}),
    (TypeError, r"rope is True; a gqa_ext.RotaryEmbedding .*RotaryEmbedding\(16\)", (128, 8, 2), {"rope": True}),
    (ValueError, r"rope has head_dim 8; .*head_dim 16", (128, 8, 2), {"rope": gqa_ext.RotaryEmbedding(8)}),
    (TypeError, r"qk_norm is True; a real number", (128, 8, 2), {"qk_norm": True}),
    (ValueError, r"qk_norm is -1.0; a finite eps", (128, 8, 2), {"qk_norm": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "sizes", "options"), CONSTRUCTORS)
def test_a_bad_construction_is_named(error: type[Exception], message: str, sizes: Any, options: Any) -> None:
    with pytest.raises(error, match=message) as raised:
        GroupedQueryAttention(*sizes, **options)
    assert re.match(r"GroupedQueryAttention\(\): .+; .+: .+", str(raised.value))


def test_what_is_off_may_be_said() -> None:
    GroupedQueryAttention(
        8, 2, 1, rope=None, qk_norm=None, window=None, softcap=0, dropout=0, alibi_slopes=None, sinks=None
    )
    build(8, 2, 1)(inputs(3, 8), kv_lengths=None, position_ids=None, cache=None)


X = inputs(2, 5, 16)
CALLS = [
    (TypeError, r"query has dtype float64; the layer's dtype float32 .*astype", {"query": X.astype(float)}),
    (TypeError, r"key has dtype float16", {"key": X.astype(np.float16)}),
    (TypeError, r"query has dtype int64", {"query": X.astype(np.int64)}),
    (TypeError, r"value has dtype complex64", {"value": X.astype(complex).astype(np.complex64)}),
    (TypeError, r"query is a masked array", {"query": np.ma.array(X)}),
    (TypeError, r"query is None", {"query": None}),
    (ValueError, r"query has shape \(16,\)", {"query": X[0, 0]}),
    (ValueError, r"query has shape \(1, 2, 5, 16\)", {"query": X[None]}),
    (ValueError, r"query has 15 features; embed_dim 16", {"query": X[..., :15]}),
    (ValueError, r"key has 15 features; kv_embed_dim 16", {"key": X[..., :15]}),
    (ValueError, r"query has 3 dimensions, key 2 and value 2; .*\[None\]", {"key": X[0]}),
    (ValueError, r"value has 4 rows but key has 5", {"value": X[:, :4]}),
    (ValueError, r"key has a batch of 3 .* query of 2", {"key": np.ones((3, 5, 16), np.float32)}),
    (ValueError, r"attn_mask has shape \(5, 6\)", {"attn_mask": np.ones((5, 6), bool)}),
    (
        ValueError,
        r"attn_mask has shape \(2, 5, 5\); .*\(2, 4, 5, 5\) .*attn_mask\[:, None\]",
        {"attn_mask": np.ones((2, 5, 5), bool)},
    ),
    (TypeError, r"attn_mask has dtype int64", {"attn_mask": np.ones((5, 5), int)}),
    (TypeError, r"attn_mask is True", {"attn_mask": True}),
    (ValueError, r"kv_lengths has shape \(3,\); .*\(query \(2, 5, 16\), key \(2, 5, 16\)\)", {"kv_lengths": [1, 2, 9]}),
    (ValueError, r"kv_lengths\[1\] is 6; .*\(query \(2, 5, 16\), key \(2, 5, 16\)\)", {"kv_lengths": [1, 6]}),
    (TypeError, r"kv_lengths has dtype bool", {"kv_lengths": [True, False]}),
    (ValueError, r"causal_alignment is 'left'; 'upper_left', 'lower_right' or None", {"causal_alignment": "left"}),
    (ValueError, r"head_mask has shape \(3,\); \(num_heads,\) = \(4,\)", {"head_mask": np.ones(3)}),
    (TypeError, r"head_mask has dtype complex128", {"head_mask": np.ones(4, complex)}),
    (ValueError, r"head_mask has 1e\+300; numbers that float32 holds", {"head_mask": [1e300, 1, 1, 1]}),
    (ValueError, r"query has -1e\+40; numbers that float32 holds", {"query": [[-1e40] * 16]}),
    (TypeError, r"is_causal is ", {"is_causal": 1}),
    (TypeError, r"need_weights is ", {"need_weights": "yes"}),
    (ValueError, r"position_ids is given; a layer with rope", {"position_ids": np.arange(5)}),
    (TypeError, r"cache is an object; a gqa_ext.KVCache .*KVCache\(batch, 2, 4", {"cache": object()}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), CALLS)
def test_a_bad_call_is_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        build(16, 4, 2)(**({"query": X} | arguments))
    assert re.match(r"GroupedQueryAttention\.__call__\(\): .+; .+: .+", str(raised.value))


def test_what_only_attention_sees_is_still_the_layers_refusal() -> None:
    layer = build(16, 4, 2, alibi_slopes=np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"^GroupedQueryAttention\.__call__\(\): alibi_slopes has shape .+; .+: .+"):
        layer(X)


def test_cross_attention_needs_a_key() -> None:
    with pytest.raises(ValueError, match=r"key is None.*kv_embed_dim 12"):
        build(16, 4, 2, kv_embed_dim=12)(X)
