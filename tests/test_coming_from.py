"""Each row of docs/coming-from.md: their call and ours give one answer.

JAX is asked itself, FlashAttention and ggml by way of other_calls.py; what is torch's, or written with
it, is in test_coming_from_torch.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from other_calls import HKV, HQ, SK, SQ, B, D, arrays, flash_attn, ggml_flash_attn_ext, ggml_slopes, near, some_masked

import gqa_ext
from gqa_ext import scaled_dot_product_attention as ours

Array = NDArray[Any]
DOCS = Path(__file__).resolve().parent.parent / "docs" / "coming-from.md"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


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


def test_flash_varlen(rng: np.random.Generator) -> None:
    """Each sequence as if alone, however the packing cuts them."""
    rows, keys = np.array([0, 3, 3, 8]), np.array([0, 4, 9, 21])
    query, key, value = (rng.standard_normal((n, h, D)) for n, h in ((8, HQ), (21, HKV), (21, HKV)))
    rules = {"window": (3, None), **LOWER_RIGHT}
    out, lse = gqa_ext.varlen_attention(query, key, value, rows, keys, is_causal=True, return_lse=True, **rules)
    for b in range(3):
        q, k = slice(rows[b], rows[b + 1]), slice(keys[b], keys[b + 1])
        theirs, theirs_lse = flash_attn(query[None, q], key[None, k], value[None, k], causal=True, window_size=(3, -1))
        near(out[q], theirs[0])
        near(lse[q], theirs_lse[0].T)


def test_flash_lse(rng: np.random.Generator) -> None:
    given = tuple(x.swapaxes(1, 2) for x in arrays(rng))
    _, theirs = flash_attn(*given, causal=True, cache_seqlens=np.array([2, SK]))
    heads_first = [x.swapaxes(1, 2) for x in given]
    _, lse = ours(*heads_first, kv_lengths=[2, SK], is_causal=True, return_lse=True, **LOWER_RIGHT)
    assert np.array_equal(lse == -np.inf, theirs == np.inf)
    assert (lse[0, :, : SQ - 2] == -np.inf).all()
    near(lse[lse > -np.inf], theirs[theirs < np.inf])


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
    both = (here.name, "test_coming_from_torch.py")
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| there |"))]
    named = [re.search(r"`(?:(test_\w+\.py)::)?(test_\w+)` \|$", row) for row in rows]
    assert len(rows) > 40
    assert all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    tests = {(name[1] or here.name, name[2]) for name in named if name}
    for file, test in tests:
        assert f"def {test}(" in (here.parent / file).read_text(encoding="utf-8"), f"{file}::{test}"
    for file in both:
        found = re.findall(r"^def (test_\w+)", (here.parent / file).read_text(encoding="utf-8"), re.M)
        missing = {test for test in found if (file, test) not in tests}
        assert missing <= {"test_every_row_names_a_test_that_is_there"}, "a test here without a row there"
