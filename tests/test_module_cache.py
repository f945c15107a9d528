"""The layer with a cache: any split of a sequence gives what the whole sequence gives at once."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gqa_ext import GroupedQueryAttention, KVCache, PagedKVCache, RotaryEmbedding

Array = NDArray[Any]
SIZES = (32, 4, 2)
HEAD_DIM, V_HEAD_DIM = 16, 8
ROPES: dict[str, RotaryEmbedding | None] = {
    "no rope": None,
    "rope": RotaryEmbedding(HEAD_DIM, rotary_dim=12, scaling={"rope_type": "yarn", "factor": 4.0,
                                                              "original_max_position_embeddings": 64}),
}  # fmt: skip
# What a number may be off by, as a share: a half has 11 or 8 bits, and int8 rows 254 steps.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 3e-2}


def inputs(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(**options: Any) -> GroupedQueryAttention:
    options = {"head_dim": HEAD_DIM, "v_head_dim": V_HEAD_DIM, "qk_norm": 1e-5, "rng": 0} | options
    return GroupedQueryAttention(*SIZES, **options)


def cache_for(batch: int = 2, **options: Any) -> KVCache:
    return KVCache(batch, SIZES[2], HEAD_DIM, v_head_dim=V_HEAD_DIM, **({"capacity": 32} | options))


def splits(length: int) -> list[list[int]]:
    """Every way to cut a sequence: 2 ** (length - 1)."""
    cuts = itertools.product([False, True], repeat=length - 1)
    return [np.diff([0, *(i + 1 for i, cut in enumerate(some) if cut), length]).tolist() for some in cuts]


def in_chunks(layer: GroupedQueryAttention, cache: KVCache, x: Array, chunks: list[int], **options: Any) -> Array:
    """Causal, chunk after chunk."""
    parts = np.split(x, np.cumsum(chunks)[:-1], axis=-2)
    return np.concatenate([layer(part, is_causal=True, cache=cache, **options) for part in parts], axis=-2)


def close(got: Array, wanted: Array, dtype: str = "float32") -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("rope", ROPES)
def test_every_split_gives_the_same(rope: str) -> None:
    layer, x = build(rope=ROPES[rope], bias=True), inputs(2, 7, SIZES[0])
    whole = layer(x, is_causal=True)
    for chunks in splits(7):
        cache = cache_for()
        close(in_chunks(layer, cache, x, chunks), whole)
        assert cache.lengths.tolist() == [7, 7]


def test_rows_that_come_as_query_key_and_value() -> None:
    """As in torch: two slices of one array are the same rows, and stand behind the cache both."""
    layer, x = build(rope=ROPES["rope"]), inputs(2, 7, SIZES[0])
    whole, cache = layer(x, is_causal=True), cache_for()
    for first, end in ((0, 4), (4, 5), (5, 7)):
        some = layer(x[:, first:end], x[:, first:end], x[:, first:end], is_causal=True, cache=cache)
        close(some, whole[:, first:end])


def test_a_window_that_the_ring_does_not_keep() -> None:
    layer, x = build(rope=ROPES["rope"], window=(3, 0)), inputs(2, 7, SIZES[0])
    with pytest.raises(ValueError, match=r"cache has a window of 2 and the layer one of \(3, 0\); .*: make the cache "
                       r"with window=4$"):  # fmt: skip
        layer(x, is_causal=True, cache=cache_for(window=2))
    close(layer(x, is_causal=True, cache=cache_for(window=4)), layer(x, is_causal=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_narrow_caches(dtype: str) -> None:
    """Near the uncached layer, and all splits near each other."""
    layer, x = build(rope=ROPES["rope"]), inputs(2, 24, SIZES[0])
    whole = layer(x, is_causal=True)
    for chunks in ([24], [1] * 24, [10, 7, 1, 6]):
        close(in_chunks(layer, cache_for(dtype=dtype), x, chunks), whole, dtype)


@pytest.mark.parametrize("rules", [
    {"window": (3, 0)}, {"softcap": 1.5, "scale": 0.7}, {"sinks": np.array([0.5, -1, 2, 0])},
    {"alibi_slopes": np.array([0.5, 0.25, 0.1, 0])},
])  # fmt: skip
def test_rules_of_the_layer(rules: dict[str, Any]) -> None:
    layer, x = build(rope=ROPES["rope"], **rules), inputs(2, 9, SIZES[0])
    whole = layer(x, is_causal=True)
    for chunks in ([9], [1] * 9, [4, 1, 4]):
        close(in_chunks(layer, cache_for(), x, chunks), whole)


@pytest.mark.parametrize("chunks", [[24] + [2] * 3, [1] * 30, [7, 7, 7, 9], [1, 20, 1, 8], [20] + [1] * 10])
def test_a_ring(chunks: list[int]) -> None:
    """Positions go on counting when old keys are gone."""
    layer, x = build(rope=ROPES["rope"], window=(4, 0)), inputs(2, 30, SIZES[0])
    cache = cache_for(capacity=24, window=5)
    close(in_chunks(layer, cache, x, chunks), layer(x, is_causal=True))
    assert cache.lengths.tolist() == [30, 30]
    kept = cache.keys
    with pytest.raises(ValueError, match=r"key has 21 rows and cache .*; at most 20 at once"):
        layer(x[:, :21], is_causal=True, cache=cache)
    assert cache.lengths.tolist() == [30, 30]
    np.testing.assert_array_equal(cache.keys, kept)


@pytest.mark.parametrize("rope", ROPES)
def test_ragged_prompts(rope: str) -> None:
    """kv_lengths says how many of the new tokens are there; each sequence goes on at its own place."""
    layer, x, cache = build(rope=ROPES[rope]), inputs(3, 9, SIZES[0]), cache_for(3)
    lengths = np.array([5, 1, 3])
    first = layer(x[:, :5], is_causal=True, cache=cache, kv_lengths=lengths)
    assert cache.lengths.tolist() == lengths.tolist()
    steps = [np.stack([x[b, n + step] for b, n in enumerate(lengths)])[:, None] for step in range(4)]
    later = np.concatenate([layer(step, cache=cache) for step in steps], axis=1)
    more = layer(x[:, :2], is_causal=True, cache=cache, kv_lengths=[0, 2, 1])
    assert cache.lengths.tolist() == [9, 7, 8]
    for b, n in enumerate(lengths):
        sequence = np.concatenate([x[b, : n + 4], x[b, : [0, 2, 1][b]]])
        whole = layer(sequence, is_causal=True)
        close(first[b, :n], whole[:n])
        close(later[b], whole[n : n + 4])
        close(more[b, : len(sequence) - n - 4], whole[n + 4 :])


def test_positions_may_be_given() -> None:
    """Two positions apart: as the uncached layer with the same ids."""
    layer, x, ids = build(rope=ROPES["rope"]), inputs(2, 6, SIZES[0]), np.arange(0, 12, 2)
    whole, cache = layer(x, is_causal=True, position_ids=ids), cache_for()
    first = layer(x[:, :4], is_causal=True, cache=cache, position_ids=ids[:4])
    rest = layer(x[:, 4:], is_causal=True, cache=cache, position_ids=np.stack([ids[4:], ids[4:]]))
    close(np.concatenate([first, rest], axis=1), whole)


def test_cross_attention_with_a_frozen_cache() -> None:
    layer = build(rope=ROPES["rope"], kv_embed_dim=20, bias=True)
    memory, x, cache = inputs(2, 11, 20, seed=1), inputs(2, 6, SIZES[0]), cache_for()
    whole = layer(x, memory)
    first = layer(x[:, :2], memory[:, :4], cache=cache)  # the memory may come in parts too
    close(first, layer(x[:, :2], memory[:, :4]))
    layer(x[:, :2], memory[:, 4:], cache=cache)
    cache.frozen = True
    for _ in range(2):
        close(layer(x, cache=cache), whole)
        close(layer(x[:, 3:], cache=cache, position_ids=np.arange(3, 6)), whole[:, 3:])
    assert cache.lengths.tolist() == [11, 11]
    with pytest.raises(ValueError, match=r"key is given; .*frozen"):
        layer(x, memory, cache=cache)
    with pytest.raises(ValueError, match=r"value is given"):
        layer(x, None, memory, cache=cache)


def test_ragged_memory() -> None:
    layer, memory, x, cache = build(), inputs(2, 5, SIZES[0], seed=1), inputs(2, 3, SIZES[0]), cache_for()
    close(layer(x, memory, cache=cache, kv_lengths=[5, 2]), layer(x, memory, kv_lengths=[5, 2]))
    cache.frozen = True
    close(layer(x, cache=cache), layer(x, memory, kv_lengths=[5, 2]))
    with pytest.raises(ValueError, match=r"kv_lengths is given"):
        layer(x, cache=cache, kv_lengths=[5, 2])


def test_inputs_without_a_batch() -> None:
    layer, x = build(rope=ROPES["rope"]), inputs(5, SIZES[0])
    whole, weights = layer(x, is_causal=True, need_weights=True)
    cache = cache_for(1)
    close(layer(x[:3], is_causal=True, cache=cache), whole[:3])
    out, some = layer(x[3:], is_causal=True, cache=cache, need_weights=True)
    close(out, whole[3:])
    close(some, weights[:, 3:])


def test_masks_weights_and_head_masks() -> None:
    layer, x = build(rope=ROPES["rope"]), inputs(2, 6, SIZES[0])
    mask = np.random.default_rng(3).random((2, 1, 6, 6)) < 0.7
    heads = np.array([1, 0, 0.5, 2])
    options: dict[str, Any] = {"is_causal": True, "head_mask": heads, "need_weights": True}
    whole, weights = layer(x, attn_mask=mask, **options)
    cache = cache_for()
    layer(x[:, :4], is_causal=True, cache=cache)
    out, some = layer(x[:, 4:], attn_mask=mask[:, :, 4:], cache=cache, **options)
    close(out, whole[:, 4:])
    close(some, weights[:, :, 4:])


def test_dropout_in_training() -> None:
    layer, x = build(dropout=0.5).train(), inputs(2, 6, SIZES[0])
    _, weights = layer(x, cache=cache_for(), need_weights=True)
    assert 0.2 < (weights == 0).mean() < 0.8
    assert (layer.eval()(x, cache=cache_for(), need_weights=True)[1] > 0).all()


def test_beam_search() -> None:
    layer, x, cache = build(rope=ROPES["rope"]), inputs(2, 4, SIZES[0]), cache_for()
    layer(x[:, :3], is_causal=True, cache=cache)
    cache.reorder([1, 1])
    step = layer(x[:, 3:], cache=cache)
    wanted = layer(np.concatenate([x[[1, 1], :3], x[:, 3:]], axis=1), is_causal=True)
    close(step, wanted[:, 3:])


BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"attn_mask has shape \(3, 9\)", {"attn_mask": np.ones((3, 9), bool)}),
    (ValueError, r"cache is full.* length 30 of capacity 32", {}),
    (ValueError, r"kv_lengths\[1\] is 4; from 0 to the number of key rows, 3", {"kv_lengths": [1, 4]}),
    (TypeError, r"causal_alignment is given; it was not wanted, as the last query row belongs to the last key",
     {"causal_alignment": "lower_right"}),
    (ValueError, r"position_ids has shape \(2,\)", {"position_ids": [1, 2]}),
    (ValueError, r"query has a batch of 1 and cache of 2; .*KVCache\(1, ...\)", {"query": inputs(1, 3, SIZES[0])}),
    (ValueError, r"query has a batch of 1 and cache of 2", {"query": inputs(3, SIZES[0])}),
    (ValueError, r"key has a batch of 1 and cache of 2", {"key": inputs(1, 3, SIZES[0])}),
    (TypeError, r"cache is a gqa_ext.paged.PagedKVCache; a gqa_ext.KVCache",
     {"cache": PagedKVCache(4, 4, 2, 16)}),
    (ValueError, r"cache has num_kv_heads 2, head_dim 16 and v_head_dim 16; the layer's 2, 16 and 8",
     {"cache": KVCache(2, 2, 16, capacity=8)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_a_call_that_fails_leaves_the_cache_as_it_was(
    error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    layer, cache = build(rope=ROPES["rope"]), cache_for()
    layer(inputs(2, 30 if not arguments else 5, SIZES[0]), is_causal=True, cache=cache)
    before = cache.lengths.tolist()
    with pytest.raises(error, match=message) as raised:
        layer(**({"query": inputs(2, 3, SIZES[0]), "cache": cache} | arguments))
    assert re.match(r"GroupedQueryAttention\.__call__\(\): .+; .+: .+", str(raised.value))
    assert cache.lengths.tolist() == before


def test_float64_has_no_cache() -> None:
    with pytest.raises(TypeError, match=r"cache is given to a layer of dtype float64; float32 was wanted"):
        build(dtype="float64")(inputs(2, 3, SIZES[0]).astype(np.float64), cache=cache_for())
