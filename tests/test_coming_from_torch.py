"""Rows of docs/coming-from.md whose other side is torch, or is written with it: asked themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from other_calls import HKV, HQ, SK, SQ, B, D, arrays, near, some_masked

import gqa_ext
from gqa_ext import scaled_dot_product_attention as ours

torch = pytest.importorskip("torch", reason="its calls are what ours are compared with")
torch.set_num_threads(1)

Array = NDArray[Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


# ---- torch.nn.functional.scaled_dot_product_attention ----


def torch_sdpa(*given: Any, **rules: Any) -> Array:
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in given]
    named = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in rules.items()}
    return np.asarray(torch.nn.functional.scaled_dot_product_attention(*tensors, **named).numpy())


def test_torch_enable_gqa(rng: np.random.Generator) -> None:
    near(ours(*arrays(rng)), torch_sdpa(*arrays(np.random.default_rng(5)), enable_gqa=True))
    with pytest.raises(RuntimeError):
        torch_sdpa(*arrays(rng))


def test_torch_is_causal(rng: np.random.Generator) -> None:
    given = arrays(rng, HQ)
    with pytest.warns(UserWarning, match="causal"):
        got = ours(*given, is_causal=True)
    near(got, torch_sdpa(*given, is_causal=True))
    near(ours(*given, is_causal=True, causal_alignment="upper_left"), got)


def test_torch_causal_lower_right(rng: np.random.Generator) -> None:
    from torch.nn.attention import bias

    given = arrays(rng, HQ)
    near(ours(*given, is_causal=True, causal_alignment="lower_right"),
         torch_sdpa(*given, attn_mask=bias.causal_lower_right(SQ, SK)))  # fmt: skip


def test_torch_mask_beside_causal(rng: np.random.Generator) -> None:
    attention = torch.nn.attention
    given, mask = arrays(rng, HQ), rng.random((SQ, SK)) < 0.7
    mask[:, 0] = True
    with attention.sdpa_kernel(attention.SDPBackend.MATH), pytest.raises(RuntimeError, match="is_causal"):
        torch_sdpa(*given, attn_mask=mask, is_causal=True)
    got = ours(*given, attn_mask=mask, is_causal=True, causal_alignment="upper_left")
    near(got, torch_sdpa(*given, attn_mask=mask & np.tri(SQ, SK, dtype=bool)))


def test_torch_dropout(rng: np.random.Generator) -> None:
    given = arrays(rng)
    out, weights = ours(*given, dropout_p=0.25, rng=3, return_weights=True)
    _, whole = ours(*given, return_weights=True)
    near(weights[weights != 0], whole[weights != 0] / 0.75)
    near(out, weights @ gqa_ext.repeat_kv(given[2], HQ // HKV))
    ones = np.ones((1, 1, 400, 400))
    for dropped in (ours(ones, ones, ones, dropout_p=0.25, rng=3), torch_sdpa(ones, ones, ones, dropout_p=0.25)):
        assert abs(dropped.mean() - 1) < 0.01
        assert dropped.std() > 0.01


def test_torch_mask_dtypes(rng: np.random.Generator) -> None:
    given, mask = arrays(rng, HQ), rng.integers(-3, 3, (SQ, SK)).astype(np.float64)
    with pytest.raises(RuntimeError):
        torch_sdpa(*given, attn_mask=mask.astype(np.float16))
    for dtype in ("float16", "float32", "float64"):
        near(ours(*given, attn_mask=mask.astype(dtype)), torch_sdpa(*given, attn_mask=mask))


# ---- torch.nn.MultiheadAttention ----


def both_modules(*, batch_first: bool = True) -> tuple[Any, gqa_ext.MultiHeadAttention]:
    """Theirs with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(HQ * D, HQ, bias=True, batch_first=batch_first, dtype=torch.float64).eval()
    module = gqa_ext.MultiHeadAttention(HQ * D, HQ, bias=True, dtype="float64")
    module.load_state_dict(theirs.state_dict())
    return theirs, module


def theirs_of(module: Any, x: Array, memory: Array, **masks: Array) -> Array:
    tensors = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    with torch.no_grad():
        out, _ = module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, memory, memory)), **tensors)
    return np.asarray(out.numpy())


def embedded(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.standard_normal((B, SQ, HQ * D)), rng.standard_normal((B, SK, HQ * D))


def test_mha_bool_mask(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), masked = embedded(rng), some_masked(rng, (SQ, SK))
    near(module(x, memory, attn_mask=~masked), theirs_of(theirs, x, memory, attn_mask=masked))


def test_mha_float_mask(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), mask = embedded(rng), rng.standard_normal((SQ, SK))
    near(module(x, memory, attn_mask=mask), theirs_of(theirs, x, memory, attn_mask=mask))


def test_mha_mask_of_three_dimensions(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), masked = embedded(rng), some_masked(rng, (B * HQ, SQ, SK))
    near(module(x, memory, attn_mask=~masked.reshape(B, HQ, SQ, SK)), theirs_of(theirs, x, memory, attn_mask=masked))


def test_mha_key_padding_at_the_end(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    x, memory = embedded(rng)
    absent = np.arange(SK) >= np.array([[4], [SK]])
    near(module(x, memory, kv_lengths=(~absent).sum(-1)), theirs_of(theirs, x, memory, key_padding_mask=absent))


def test_mha_key_padding_anywhere(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), absent = embedded(rng), some_masked(rng, (B, SK))
    near(module(x, memory, attn_mask=~absent[:, None, None]), theirs_of(theirs, x, memory, key_padding_mask=absent))


def test_mha_rows_without_a_key(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), masked = embedded(rng), np.zeros((SQ, SK), bool)
    masked[1] = True
    assert np.isnan(theirs_of(theirs, x, memory, attn_mask=masked)[:, 1]).all()
    out = module(x, memory, attn_mask=~masked)
    near(out[:, 1], np.broadcast_to(theirs.out_proj.bias.detach().numpy(), out[:, 1].shape))


def test_mha_weights(rng: np.random.Generator) -> None:
    theirs, module = both_modules()
    (x, memory), masked = embedded(rng), some_masked(rng, (SQ, SK))
    given = (torch.from_numpy(a) for a in (x, memory, memory))
    _, wanted = theirs(*given, attn_mask=torch.from_numpy(masked), need_weights=True)
    _, weights = module(x, memory, attn_mask=~masked, need_weights=True)
    assert weights.shape == (B, HQ, SQ, SK)
    near(weights.mean(1), wanted.detach().numpy(), 1e-6)  # ours are float32


def test_mha_layout(rng: np.random.Generator) -> None:
    theirs, module = both_modules(batch_first=False)
    x, memory = embedded(rng)
    near(module(x, memory), theirs_of(theirs, x.swapaxes(0, 1), memory.swapaxes(0, 1)).swapaxes(0, 1))


# ---- Hugging Face ----


def eager(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """transformers' eager attention in our layout, by the function itself."""
    return eager_weights(query, key, value, mask)[0].swapaxes(1, 2)


def eager_weights(query: Array, key: Array, value: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """(out (B, S, H, D), weights (B, H, Sq, Sk))."""
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import eager_attention_forward

    layer = torch.nn.Module().eval()
    layer.num_key_value_groups = query.shape[1] // key.shape[1]
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in (query, key, value, mask)]
    out, weights = eager_attention_forward(layer, *tensors, scaling=query.shape[-1] ** -0.5)
    return np.asarray(out.numpy()), np.asarray(weights.numpy())


def test_hf_weights(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    near(ours(*given, return_weights=True)[1], eager_weights(*given)[1], 1e-5)


def test_hf_repeat_kv(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    near(ours(*given), eager(*given), 1e-5)


def test_hf_right_padding(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    attention_mask = (np.arange(SK) < np.array([[4], [SK]])).astype(np.int64)
    mask = np.where(attention_mask[:, None, None] == 1, 0, np.finfo(np.float32).min).astype(np.float32)
    near(ours(*given, kv_lengths=attention_mask.sum(-1)), eager(*given, mask), 1e-5)


def test_hf_finite_mask(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    mask = np.zeros((1, 1, SQ, SK), np.float32)
    mask[..., 3:] = mask[..., 1, :] = np.finfo(np.float32).min
    near(ours(*given, mask), eager(*given, mask), 1e-5)
    near(ours(*given, mask)[:, :, 1], gqa_ext.repeat_kv(given[2], HQ // HKV).mean(-2), 1e-5)
    assert not ours(*given, mask == 0)[:, :, 1].any()
