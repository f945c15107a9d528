"""Each row of docs/coming-from.md: their call and ours give one answer.

torch, transformers and JAX are asked themselves, FlashAttention and ggml by way of other_calls.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from other_calls import flash_attn, ggml_flash_attn_ext, ggml_slopes

import gqa_ext
from gqa_ext import scaled_dot_product_attention as ours

Array = NDArray[Any]
B, HQ, HKV, SQ, SK, D = 2, 4, 2, 5, 9, 8
DOCS = Path(__file__).resolve().parent.parent / "docs" / "coming-from.md"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def arrays(rng: np.random.Generator, heads: int = HKV, dtype: str = "float64") -> tuple[Array, Array, Array]:
    """query (B, HQ, SQ, D); key and value (B, heads, SK, D)."""
    query = rng.standard_normal((B, HQ, SQ, D)).astype(dtype)
    key, value = (rng.standard_normal((B, heads, SK, D)).astype(dtype) for _ in range(2))
    return query, key, value


def near(got: Any, wanted: Any, digits: float = 1e-11) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=digits, atol=digits)


# ---- torch.nn.functional.scaled_dot_product_attention ----


def torch_sdpa(*given: Any, **rules: Any) -> Array:
    torch = pytest.importorskip("torch")
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
    bias = pytest.importorskip("torch.nn.attention.bias")
    given = arrays(rng, HQ)
    near(ours(*given, is_causal=True, causal_alignment="lower_right"),
         torch_sdpa(*given, attn_mask=bias.causal_lower_right(SQ, SK)))  # fmt: skip


def test_torch_mask_beside_causal(rng: np.random.Generator) -> None:
    attention = pytest.importorskip("torch.nn.attention")
    given, mask = arrays(rng, HQ), rng.random((SQ, SK)) < 0.7
    mask[:, 0] = True
    with attention.sdpa_kernel(attention.SDPBackend.MATH), pytest.raises(RuntimeError, match="is_causal"):
        torch_sdpa(*given, attn_mask=mask, is_causal=True)
    got = ours(*given, attn_mask=mask, is_causal=True, causal_alignment="upper_left")
    near(got, torch_sdpa(*given, attn_mask=mask & np.tri(SQ, SK, dtype=bool)))


def test_torch_mask_dtypes(rng: np.random.Generator) -> None:
    given, mask = arrays(rng, HQ), rng.integers(-3, 3, (SQ, SK)).astype(np.float64)
    with pytest.raises(RuntimeError):
        torch_sdpa(*given, attn_mask=mask.astype(np.float16))
    for dtype in ("float16", "float32", "float64"):
        near(ours(*given, attn_mask=mask.astype(dtype)), torch_sdpa(*given, attn_mask=mask))


# ---- torch.nn.MultiheadAttention ----


def both_modules(*, batch_first: bool = True) -> tuple[Any, gqa_ext.MultiHeadAttention]:
    """Theirs with random weights, and ours with the same."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(HQ * D, HQ, bias=True, batch_first=batch_first, dtype=torch.float64).eval()
    module = gqa_ext.MultiHeadAttention(HQ * D, HQ, bias=True, dtype="float64")
    module.load_state_dict(theirs.state_dict())
    return theirs, module


def theirs_of(module: Any, x: Array, memory: Array, **masks: Array) -> Array:
    import torch

    tensors = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    with torch.no_grad():
        out, _ = module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, memory, memory)), **tensors)
    return np.asarray(out.numpy())


def embedded(rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.standard_normal((B, SQ, HQ * D)), rng.standard_normal((B, SK, HQ * D))


def some_masked(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """True = masked; never all of a row."""
    masked = rng.random(shape) < 0.4
    masked[..., 2] = False
    return masked


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


def test_mha_layout(rng: np.random.Generator) -> None:
    theirs, module = both_modules(batch_first=False)
    x, memory = embedded(rng)
    near(module(x, memory), theirs_of(theirs, x.swapaxes(0, 1), memory.swapaxes(0, 1)).swapaxes(0, 1))


# ---- FlashAttention ----


def flash(given: tuple[Array, ...], **rules: Any) -> Array:
    """Their answer in our layout."""
    query, key, value = given
    return flash_attn(query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2), **rules)[0].swapaxes(1, 2)


LOWER_RIGHT = {"causal_alignment": "lower_right"}


def test_flash_layout(rng: np.random.Generator) -> None:
    q = rng.standard_normal((B, SQ, HQ, D))
    k, v = (rng.standard_normal((B, SK, HKV, D)) for _ in range(2))
    wanted, _ = flash_attn(q, k, v, softmax_scale=0.3)
    near(ours(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), scale=0.3).swapaxes(1, 2), wanted)


def test_flash_causal(rng: np.random.Generator) -> None:
    given = arrays(rng)
    near(ours(*given, is_causal=True, **LOWER_RIGHT), flash(given, causal=True))
    swapped = (rng.standard_normal((B, HQ, SK, D)), *(x[:, :, :SQ] for x in given[1:]))
    near(ours(*swapped, is_causal=True, **LOWER_RIGHT), flash(swapped, causal=True))


def test_flash_window(rng: np.random.Generator) -> None:
    given = arrays(rng)
    for left, right in ((2, 1), (0, 0), (-1, 1), (3, -1), (-1, -1)):
        window = (None if left == -1 else left, None if right == -1 else right)
        near(ours(*given, window=window, **LOWER_RIGHT), flash(given, window_size=(left, right)))
        near(ours(*given, is_causal=True, window=(window[0], None), **LOWER_RIGHT),
             flash(given, causal=True, window_size=(left, -1)))  # fmt: skip
    with pytest.raises(ValueError, match="window"):
        ours(*given, window=(-1, -1))


def test_flash_softcap(rng: np.random.Generator) -> None:
    given = arrays(rng)
    for softcap in (0.0, 1.5):
        near(ours(*given, softcap=softcap), flash(given, softcap=softcap))


def test_flash_alibi(rng: np.random.Generator) -> None:
    given = arrays(rng)
    for slopes in (rng.random(HQ), rng.random((B, HQ))):
        near(ours(*given, alibi_slopes=slopes, **LOWER_RIGHT), flash(given, alibi_slopes=slopes))


def test_flash_cache_seqlens(rng: np.random.Generator) -> None:
    given, lengths = arrays(rng), np.array([SQ, SK - 1])
    for causal in (False, True):
        near(ours(*given, kv_lengths=lengths, is_causal=causal, window=(3, None), **LOWER_RIGHT),
             flash(given, cache_seqlens=lengths, causal=causal, window_size=(3, -1)))  # fmt: skip


def test_flash_cache_leftpad(rng: np.random.Generator) -> None:
    given, leftpad = arrays(rng), np.array([0, 3])
    got = ours(
        *given,
        is_causal=True,
        key_positions=np.arange(SK) - leftpad[:, None],
        query_positions=SK - SQ + np.arange(SQ) - leftpad[:, None],
    )
    near(got, flash(given, cache_leftpad=leftpad, causal=True))


def test_flash_lse(rng: np.random.Generator) -> None:
    given = tuple(x.swapaxes(1, 2) for x in arrays(rng))
    _, theirs = flash_attn(*given, causal=True, cache_seqlens=np.array([2, SK]))
    heads_first = [x.swapaxes(1, 2) for x in given]
    _, lse = ours(*heads_first, kv_lengths=[2, SK], is_causal=True, return_lse=True, **LOWER_RIGHT)
    assert np.array_equal(lse == -np.inf, theirs == np.inf)
    assert (lse[0, :, : SQ - 2] == -np.inf).all()
    near(lse[lse > -np.inf], theirs[theirs < np.inf])


# ---- Hugging Face ----


def eager(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """transformers' eager attention in ours' layout, by the function itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import eager_attention_forward

    layer = torch.nn.Module().eval()
    layer.num_key_value_groups = query.shape[1] // key.shape[1]
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in (query, key, value, mask)]
    out, _ = eager_attention_forward(layer, *tensors, scaling=query.shape[-1] ** -0.5)
    return np.asarray(out.numpy()).swapaxes(1, 2)


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


# ---- JAX ----


def jax_attention(given: tuple[Array, ...], **rules: Any) -> Any:
    jax = pytest.importorskip("jax", reason="its dot_product_attention is what ours is compared with")
    bnts = {"bias", "mask"}
    named = {k: v if k in bnts or isinstance(v, bool | tuple | int | float) else v.astype(np.int32)
             for k, v in rules.items()}  # fmt: skip
    return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in given), **named)


def jax_out(given: tuple[Array, ...], **rules: Any) -> Array:
    return np.asarray(jax_attention(given, **rules)).swapaxes(1, 2)


def test_jax_layout(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    near(ours(*given), jax_out(given), 1e-5)
    near(ours(*given, scale=0.2), jax_out(given, scale=0.2), 1e-5)


def test_jax_bias_and_mask(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    bias, mask = rng.standard_normal((B, HQ, SQ, SK)).astype(np.float32), ~some_masked(rng, (B, 1, SQ, SK))
    near(ours(*given, np.where(mask, bias, -np.inf)), jax_out(given, bias=bias, mask=mask), 1e-5)


def test_jax_causal(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    near(ours(*given, is_causal=True, causal_alignment="upper_left"), jax_out(given, is_causal=True), 1e-5)


def test_jax_window(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    near(ours(*given, window=(2, 1)), jax_out(given, local_window_size=(2, 1)), 1e-5)
    near(ours(*given, window=(2, 2)), jax_out(given, local_window_size=2), 1e-5)


def test_jax_lengths(rng: np.random.Generator) -> None:
    given, rows, keys = arrays(rng, dtype="float32"), np.array([2, SQ]), np.array([SK, 4])
    near(ours(*given, kv_lengths=keys, query_lengths=rows),
         jax_out(given, key_value_seq_lengths=keys, query_seq_lengths=rows), 1e-5)  # fmt: skip


def test_jax_rows_without_a_key(rng: np.random.Generator) -> None:
    given, mask = arrays(rng, dtype="float32"), np.ones((1, 1, SQ, SK), bool)
    mask[..., 1, :] = False
    near(jax_out(given, mask=mask)[:, :, 1], gqa_ext.repeat_kv(given[2], HQ // HKV).mean(-2), 1e-5)
    assert not ours(*given, mask)[:, :, 1].any()


def test_jax_residual(rng: np.random.Generator) -> None:
    given = arrays(rng, dtype="float32")
    _, residual = jax_attention(given, return_residual=True)
    near(ours(*given, return_lse=True)[1], np.asarray(residual).swapaxes(1, 2), 1e-5)


# ---- ggml ----


def test_ggml_layout(rng: np.random.Generator) -> None:
    """ne counts from the fastest dimension on, as NumPy's reversed shape does."""
    given = arrays(rng)
    tensors = [(x.shape[::-1], x.tobytes()) for x in given]  # ne and data, as ggml keeps them
    memory = [np.frombuffer(data).reshape(ne[::-1]) for ne, data in tensors]
    near(ours(*memory).swapaxes(1, 2), ggml_flash_attn_ext(given))


def test_ggml_mask(rng: np.random.Generator) -> None:
    given, keep = arrays(rng), ~some_masked(rng, (SQ, SK))
    mask = np.where(keep, rng.standard_normal((SQ, SK)), -np.inf).astype(np.float16)
    near(ours(*given, mask), ggml_flash_attn_ext(given, mask).swapaxes(1, 2))


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 71])
def test_ggml_max_bias(heads: int, rng: np.random.Generator) -> None:
    given = tuple(rng.standard_normal((B, heads, SK, D)) for _ in range(3))
    distance = -np.abs(np.arange(SK)[:, None] - np.arange(SK)).astype(np.float16)
    for max_bias in (8.0, 4.0):
        slopes = gqa_ext.get_alibi_slopes(heads).astype(np.float64) ** (max_bias / 8)
        wanted = ggml_flash_attn_ext(given, distance, max_bias).swapaxes(1, 2)
        near(ours(*given, alibi_slopes=slopes), wanted, 1e-5)  # our slopes are float32
        near(ours(*given, alibi_slopes=ggml_slopes(heads, max_bias)), wanted)


def test_ggml_softcap(rng: np.random.Generator) -> None:
    given = arrays(rng)
    for softcap in (0.0, 2.0):
        near(ours(*given, softcap=softcap), ggml_flash_attn_ext(given, logit_softcap=softcap).swapaxes(1, 2))


def test_ggml_sinks(rng: np.random.Generator) -> None:
    given, sinks = arrays(rng), rng.standard_normal(HQ)
    near(ours(*given, sinks=sinks), ggml_flash_attn_ext(given, sinks=sinks).swapaxes(1, 2))


# ---- the table itself ----


@pytest.mark.skipif(not DOCS.is_file(), reason="a source distribution carries the tests but not the docs")
def test_every_row_names_a_test_that_is_there() -> None:
    here = Path(__file__)
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| there |"))]
    named = [re.search(r"`(?:(test_\w+\.py)::)?(test_\w+)` \|$", row) for row in rows]
    assert len(rows) > 40
    assert all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    for file, test in (name.groups() for name in named if name):
        text = (here.parent / (file or here.name)).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{file}::{test}"
    missing = set(re.findall(r"^def (test_\w+)", here.read_text(encoding="utf-8"), re.M))
    missing -= {name[2] for name in named if name and not name[1]}
    assert missing == {"test_every_row_names_a_test_that_is_there"}
