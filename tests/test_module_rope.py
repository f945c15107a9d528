"""The layer's rope and qk_norm against Hugging Face's attention modules, and against themselves."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

import gqa_ext
from gqa_ext import GroupedQueryAttention, KVCache, MultiHeadAttention, RotaryEmbedding

Array = NDArray[Any]
SIZES = (48, 6, 2)  # embed_dim, num_heads, num_kv_heads
HEAD_DIM = 16  # not 48 / 6
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 300.0,
}  # fmt: skip
POSITIONS = [None, np.arange(40, 49), np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 4, 1, 5, 9, 2, 6, 5]])]


def inputs(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(**options: Any) -> GroupedQueryAttention:
    """A layer with norms that do something."""
    layer = GroupedQueryAttention(*SIZES, head_dim=HEAD_DIM, rng=0, **options)
    for seed, norm in enumerate((layer.q_norm, layer.k_norm)):
        if norm is not None:
            norm.weight[...] = 1 + 0.3 * inputs(HEAD_DIM, seed=seed + 5)
    return layer


# ---- against Hugging Face ----


def theirs(name: str, **settings: Any) -> Any:
    """An attention module with random weights, and the embedding that gives its cosines and sines."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="its attention modules are what ours is compared with")
    module = pytest.importorskip(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=SIZES[0], num_attention_heads=SIZES[1], num_key_value_heads=SIZES[2], head_dim=HEAD_DIM,
        num_hidden_layers=1, vocab_size=8, intermediate_size=8, max_position_embeddings=64, **settings)  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = getattr(module, f"{name}Attention")(config, 0).eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.4)
    return config, attention, getattr(module, f"{name}RotaryEmbedding")(config)


def run(attention: Any, embedding: Any, x: Array, positions: Array | None) -> Array:
    """Causal, as their models call it."""
    import torch

    length = x.shape[1]
    ids = torch.from_numpy(np.arange(length)[None] if positions is None else np.atleast_2d(positions))
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    tokens = torch.from_numpy(x)
    with torch.no_grad():
        out: Array = attention(tokens, embedding(tokens, ids), mask)[0].numpy()
    return out


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("name", "settings"), [
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "attention_bias": True}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "rms_norm_eps": 1e-3}),
    ("Qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "rms_norm_eps": 1e-6}),
])  # fmt: skip
def test_hugging_face(name: str, settings: dict[str, Any], positions: Array | None) -> None:
    config, attention, embedding = theirs(name, **copy.deepcopy(settings))
    rope = RotaryEmbedding(HEAD_DIM, scaling=config.rope_parameters, max_position_embeddings=64)
    layer = GroupedQueryAttention(
        *SIZES, head_dim=HEAD_DIM, rope=rope, bias=config.attention_bias,
        qk_norm=config.rms_norm_eps if name == "Qwen3" else None)  # fmt: skip
    state = attention.state_dict()
    layer.load_state_dict(state)
    assert set(layer.state_dict()) == set(state)
    x = inputs(2, 9, SIZES[0])
    out = layer(x, is_causal=True, position_ids=positions)
    wanted = run(attention, embedding, x, positions)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=2e-5)
    cache = KVCache(2, SIZES[2], HEAD_DIM, capacity=9)
    ids = np.arange(9) if positions is None else positions
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        out = layer(x[:, begin:end], is_causal=True, cache=cache, position_ids=ids[..., begin:end])
        np.testing.assert_allclose(out, wanted[:, begin:end], rtol=1e-4, atol=2e-5)


# ---- against the oracle ----


def norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def by_reference(layer: GroupedQueryAttention, query: Array, key: Array, at_q: Any, at_k: Any, **rules: Any) -> Array:
    """Project, norm, turn, attend, project, in float64."""

    def heads(x: Array, linear: Any, number: int) -> Array:
        return (x.astype(np.float64) @ linear.weight.T.astype(np.float64)).reshape(*x.shape[:-1], number, -1)

    def turned(x: Array, weights: Any, positions: Any) -> Array:
        if layer.qk_norm is not None:
            x = norm(x, weights.weight.astype(np.float64), layer.qk_norm)
        x = x.swapaxes(-2, -3)
        return x if layer.rope is None else layer.rope(x, positions)

    q = turned(heads(query, layer.q_proj, layer.num_heads), layer.q_norm, at_q)
    k = turned(heads(key, layer.k_proj, layer.num_kv_heads), layer.k_norm, at_k)
    v = heads(key, layer.v_proj, layer.num_kv_heads).swapaxes(-2, -3)
    attended = reference.attention(q, k, v, **rules).out.swapaxes(-2, -3)
    out: Array = attended.reshape(*query.shape[:-1], -1) @ layer.o_proj.weight.T.astype(np.float64)
    return out


@pytest.mark.parametrize("rope", [None, RotaryEmbedding(HEAD_DIM, rotary_dim=6, interleaved=True)])
@pytest.mark.parametrize("qk_norm", [None, 0.1])
def test_self_attention(rope: RotaryEmbedding | None, qk_norm: float | None) -> None:
    layer = build(rope=rope, qk_norm=qk_norm)
    x = inputs(2, 9, SIZES[0])
    for positions in POSITIONS if rope else [None]:
        for keys in ((), (x,), (x, x)):
            out = layer(x, *keys, is_causal=True, position_ids=positions)
            wanted = by_reference(layer, x, x, positions, positions, is_causal=True)
            np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    single = layer(x[0], is_causal=True, position_ids=np.arange(9) if rope else None)
    np.testing.assert_allclose(single, layer(x, is_causal=True)[0], rtol=1e-5, atol=1e-6)


def test_keys_of_another_sequence_stand_where_they_are() -> None:
    layer, positions = build(rope=RotaryEmbedding(HEAD_DIM), qk_norm=1e-6), np.array([[7, 8, 9]])
    x, memory = inputs(2, 3, SIZES[0]), inputs(2, 11, SIZES[0], seed=1)
    wanted = by_reference(layer, x, memory, positions, None)
    np.testing.assert_allclose(layer(x, memory, position_ids=positions), wanted, rtol=1e-4, atol=1e-5)


def test_only_distances_count() -> None:
    """What rope is for: a shift of all positions changes nothing but rounding."""
    layer, x = build(rope=RotaryEmbedding(HEAD_DIM), dtype="float64"), inputs(1, 9, SIZES[0]).astype(np.float64)
    far = layer(x, is_causal=True, position_ids=np.arange(9) + 1_000_000)
    np.testing.assert_allclose(far, layer(x, is_causal=True), rtol=1e-7, atol=1e-8)
    assert not np.allclose(layer(x, is_causal=True, position_ids=2 * np.arange(9)), far, rtol=1e-3)


# ---- weights, repr, pooling ----


def test_norms_are_parameters() -> None:
    layer = build(qk_norm=1e-6, sinks=np.zeros(6))
    names = [name for name, _ in layer.named_parameters()]
    assert names[-3:] == ["q_norm.weight", "k_norm.weight", "sinks"]
    assert layer.num_parameters() == build(sinks=np.zeros(6)).num_parameters() + 2 * HEAD_DIM
    other = GroupedQueryAttention(*SIZES, head_dim=HEAD_DIM, qk_norm=1e-6, sinks=np.ones(6), rng=9)
    other.load_state_dict(layer.state_dict("a.", out_name="out_proj"), prefix="a.")
    x = inputs(1, 4, SIZES[0])
    np.testing.assert_array_equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"lacks q_norm.weight, k_norm.weight"):
        other.load_state_dict(build(sinks=np.zeros(6)).state_dict())
    with pytest.raises(ValueError, match=r"unexpected q_norm.weight, k_norm.weight"):
        build(sinks=np.zeros(6)).load_state_dict(layer.state_dict())
    assert repr(layer.q_norm) == "RMSNorm(16, eps=1e-06, dtype='float32')"


def test_repr_is_the_constructor_call() -> None:
    layer = build(rope=RotaryEmbedding(HEAD_DIM, scaling=LLAMA3), qk_norm=1e-6)
    text = f"GroupedQueryAttention(48, 6, 2, head_dim=16, rope=RotaryEmbedding(16, scaling={LLAMA3!r}), qk_norm=1e-06)"
    assert repr(layer) == text
    assert repr(eval(text, vars(gqa_ext))) == text
    x = inputs(1, 4, SIZES[0])
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(same) == text
        np.testing.assert_array_equal(same(x), layer(x))


def test_pooling_keeps_rope_and_norms() -> None:
    """Key heads that are equal pool to themselves, so the pooled layer gives the same."""
    mha = MultiHeadAttention(48, 6, rope=RotaryEmbedding(8, base=100.0), qk_norm=0.01, bias=True, rng=0)
    for linear in (mha.k_proj, mha.v_proj):
        linear.weight[...] = np.repeat(linear.weight.reshape(2, 3, 8, 48)[:, :1], 3, axis=1).reshape(48, 48)
    assert mha.q_norm is not None
    assert mha.k_norm is not None
    mha.q_norm.weight[...], mha.k_norm.weight[...] = 1 + inputs(2, 8) / 4
    grouped = GroupedQueryAttention.from_mha(mha, 2)
    assert repr(grouped) == repr(mha).replace("MultiHeadAttention(48, 6", "GroupedQueryAttention(48, 6, 2")
    x = inputs(2, 9, 48)
    np.testing.assert_allclose(grouped(x, is_causal=True), mha(x, is_causal=True), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"unexpected q_norm.weight, k_norm.weight"):
        GroupedQueryAttention.from_mha(mha.state_dict(), 2, num_heads=6)


# ---- wrong arguments ----

X = inputs(2, 5, SIZES[0])
CALLS = [
    (ValueError, r"position_ids has shape \(4,\); \(5,\) or \(2, 5\) was wanted", {"position_ids": np.arange(4)}),
    (ValueError, r"position_ids has shape \(\)", {"position_ids": 3}),
    (ValueError, r"position_ids has shape \(3, 5\)", {"position_ids": np.ones((3, 5), int)}),
    (ValueError, r"position_ids has shape \(1, 5\)", {"query": X[0], "position_ids": np.ones((1, 5), int)}),
    (TypeError, r"position_ids has dtype float64; an array of integers", {"position_ids": np.arange(5.0)}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), CALLS)
def test_bad_positions_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as raised:
        build(rope=RotaryEmbedding(HEAD_DIM))(**({"query": X} | arguments))
    assert re.match(r"[\w.]+\(\): .+; .+: .+", str(raised.value))
