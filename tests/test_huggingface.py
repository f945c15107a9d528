"""Hugging Face's eager attention, seen at work inside tiny models with random weights, against ours.

Nothing is downloaded.  What each model's attention was given (query, key and value after their
projections and rotation) goes through our call with rules in place of the mask that transformers
built; rows of padding, which hold whatever comes of -3e38 there, are not compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Problem
from rules import agree

import gqa_ext

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="its eager attention is what ours is compared with")
torch.set_num_threads(1)

Array = NDArray[Any]
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # module of transformers -> class name's stem, its own settings
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}),
    "mistral": ("Mistral", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
PADDING = (0, 4)  # absent tokens at the left of each sequence
LENGTH, STEP = 12, 3  # tokens of the first call, and of the second that reads the cache


@dataclass(frozen=True)
class Seen:
    """One call of a model's attention."""

    query: Array  # (B, Hq, Sq, D)
    key: Array  # (B, Hkv, Sk, D)
    value: Array
    out: Array  # (B, Hq, Sq, D)
    rules: dict[str, Any]


def tiny(name: str) -> Any:
    """A model with scores large enough for softcap, window and sinks to matter."""
    stem, settings = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**SIZES, **settings)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    return shaken(getattr(transformers, f"{stem}Model")(config))


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model.eval()


@contextmanager
def watched(name: str) -> Iterator[list[Seen]]:
    """All that a model's eager attention is called with, and gives, while the block runs."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    eager: Callable[..., Any] = module.eager_attention_forward
    calls: list[Seen] = []

    def spy(layer: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        out, weights = eager(layer, query, key, value, mask, **given)
        width = given.get("sliding_window")
        rules = {
            "scale": given["scaling"],
            "softcap": given.get("softcap"),
            "window": None if width is None else (width - 1, 0),  # theirs counts the row's own key
            "sinks": layer.sinks.numpy() if hasattr(layer, "sinks") else None,
        }
        calls.append(Seen(*(x.numpy() for x in (query, key, value, out.transpose(1, 2))), rules))
        return out, weights

    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            yield calls
    finally:
        module.eager_attention_forward = eager


def tokens(length: int) -> Any:
    return torch.arange(len(PADDING) * length).reshape(len(PADDING), length) % 50


def attention_mask(length: int) -> Any:
    """1 where a token is there, (B, length)."""
    return (torch.arange(length) >= torch.tensor(PADDING)[:, None]).long()


def positions(length: int) -> Array:
    """Of each sequence's tokens, -1 where there is none: what left padding is to us. (B, length)"""
    return np.maximum(np.arange(length) - np.array(PADDING)[:, None], -1)


def compare(seen: Seen, isa: str, live: Array, **rules: Any) -> None:
    """Ours against the oracle everywhere, and against theirs in the rows (B, Sq) that are live."""
    out, _ = agree(Problem(seen.query, seen.key, seen.value, is_causal=True, **seen.rules, **rules), isa)
    rows = np.broadcast_to(live[:, None], out.shape[:-1])
    np.testing.assert_allclose(out[rows], seen.out[rows], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_cached_steps(name: str, isa: str) -> None:
    """Without padding: causal, then lower_right when keys are in the cache already."""
    model = tiny(name)
    with watched(name) as calls:
        cache = model(tokens(LENGTH), use_cache=True).past_key_values
        model(tokens(STEP), past_key_values=cache, use_cache=True)
    assert len(calls) == 4
    for seen in calls:
        live = np.ones(seen.out.shape[::2][:2], bool)
        # A layer that slides keeps no more keys than it needs, so the last key is the one to count from.
        compare(seen, isa, live, causal_alignment="lower_right")


@pytest.mark.parametrize("name", MODELS)
def test_left_padding(name: str, isa: str) -> None:
    """Their attention_mask is our key_positions and query_positions; no mask is built."""
    model = tiny(name)
    with watched(name) as calls:
        model(tokens(LENGTH), attention_mask=attention_mask(LENGTH))
    where = positions(LENGTH)
    assert len(calls) == 2
    for seen in calls:
        compare(seen, isa, where >= 0, query_positions=where, key_positions=where)


def test_the_rules_matter() -> None:
    """Each model's own rules were there to be tested: windows in some layers, softcaps, sinks that count."""
    rules = {}
    for name in MODELS:
        with watched(name) as calls:
            tiny(name)(tokens(LENGTH))
        rules[name] = [seen.rules for seen in calls]
    assert [r["window"] for r in rules["gemma2"]] == [(4, 0), None]
    assert [r["window"] for r in rules["gpt_oss"]] == [(4, 0), None]
    assert [r["window"] for r in rules["mistral"]] == [(4, 0), (4, 0)]
    assert {r["softcap"] for r in rules["gemma2"]} == {2.0}
    assert all(np.abs(r["sinks"]).max() > 0.1 for r in rules["gpt_oss"])


def bloom(num_heads: int, mask: Any) -> tuple[Array, Array, Array, Array]:
    """query, key, value and what attention made of them, (B, H, S, D), in the first layer of a BLOOM."""
    config = transformers.BloomConfig(vocab_size=50, hidden_size=8 * num_heads, n_layer=1, n_head=num_heads)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = shaken(transformers.BloomModel(config))
    layer = model.h[0].self_attention
    seen: list[Any] = []
    layer.query_key_value.register_forward_hook(lambda _, given, fused: seen.extend(layer._reshape(fused)))
    layer.dense.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    with torch.no_grad():
        model(tokens(LENGTH), attention_mask=mask)
    *projected, merged = (x.numpy() for x in seen)
    query, key, value = projected
    return query, key, value, merged.reshape(*merged.shape[:2], num_heads, -1).swapaxes(1, 2)


@pytest.mark.parametrize("num_heads", [1, 4, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_bloom(num_heads: int, padded: bool, isa: str) -> None:
    """Theirs adds slope times the key's position, ours takes slope times the distance: alike under causal."""
    mask = attention_mask(LENGTH) if padded else torch.ones_like(attention_mask(LENGTH))
    query, key, value, out = bloom(num_heads, mask)
    seen = Seen(query, key, value, out, {"alibi_slopes": gqa_ext.get_alibi_slopes(num_heads)})
    if padded:
        where = positions(LENGTH)
        compare(seen, isa, where >= 0, query_positions=where, key_positions=where)
    else:
        compare(seen, isa, np.ones(mask.shape, bool))


def test_slopes_are_blooms() -> None:
    """Every head count up to 80, powers of two or not."""
    from transformers.models.bloom import modeling_bloom

    for n in range(1, 81):
        theirs = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].numpy()
        np.testing.assert_allclose(gqa_ext.get_alibi_slopes(n), theirs, rtol=1e-5)
