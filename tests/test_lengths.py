"""Ragged batches: each sequence gets, to the bit, what a call with its own rows and keys alone gives.

kv_lengths and query_lengths say how much of each sequence is there.  What lies past them is never
looked at: not its values, and for keys not even its memory.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rules
from numpy.typing import NDArray
from reference import Problem
from rules import DTYPES, Mix, agree, attend
from test_guard import guarded

import gqa_ext

Array = NDArray[Any]
KV_LENGTHS = (700, 0, 1, 127, 128, 129, 515, 699)
SIZES = [1, 3, 20, 64]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "causal_alignment": "lower_right"},
    {"is_causal": True, "causal_alignment": "upper_left"},
    {"window": (40, 3), "causal_alignment": "lower_right"},
    {"softcap": 1.5, "alibi_slopes": np.array([0.25, 0.03]), "causal_alignment": "lower_right"},
    {"sinks": np.array([0.5, 3.0], np.float32)},
]


def names_of(variant: dict[str, Any]) -> str:
    return "+".join(variant) or "plain"


def ragged(seq_q: int, dtype: str) -> Problem:
    """Eight sequences, rubbish past the end of each."""
    mix = Mix((), dtype, batch=len(KV_LENGTHS), num_kv_heads=1, seq_q=seq_q, seq_k=max(KV_LENGTHS))
    given = rules.problem(mix)
    key, value = given.key.copy(), given.value.copy()
    for b, length in enumerate(KV_LENGTHS):
        key[b, :, length:], value[b, :, length:] = np.nan, np.inf
    return replace(given, key=key, value=value, kv_lengths=np.array(KV_LENGTHS))


def single(given: Problem, b: int, rows: int, keys: int, **more: Any) -> tuple[Array, ...]:
    """Sequence b alone, trimmed to its rows and keys, in arrays of its own."""
    query, key, value = given.query[b, :, :rows], given.key[b, :, :keys], given.value[b, :, :keys]
    alone = replace(given, query=query.copy(), key=key.copy(), value=value.copy(), query_lengths=None, kv_lengths=None)
    return attend(replace(alone, **more))


def same(got: tuple[Array, ...], wanted: tuple[Array, ...], label: str = "") -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape, label
        assert a.tobytes() == b.tobytes(), f"{label}: {(a != b).sum()} of {a.size} differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", SIZES)
@pytest.mark.parametrize("variant", VARIANTS, ids=names_of)
def test_ragged_keys_equal_trimmed_calls(variant: dict[str, Any], seq_q: int, dtype: str, isa: str) -> None:
    given = replace(ragged(seq_q, dtype), **variant)
    out, lse = agree(given, isa, names_of(variant)) if dtype == "float32" else attend(given)
    for b, length in enumerate(KV_LENGTHS):
        same((out[b], lse[b]), single(given, b, seq_q, length), f"sequence {b} of {length} keys")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", [20, 64])
@pytest.mark.parametrize("variant", VARIANTS, ids=names_of)
def test_ragged_rows_equal_trimmed_calls(variant: dict[str, Any], seq_q: int, dtype: str, isa: str) -> None:
    """The kernels' form follows a sequence's own rows, and lower_right its own lengths."""
    query_lengths = np.array([seq_q, 5, 1, 0, 3, seq_q - 1, 17, 2])
    given = replace(ragged(seq_q, dtype), query_lengths=query_lengths, **variant)
    query = given.query.copy()
    for b, rows in enumerate(query_lengths):
        query[b, :, rows:] = np.nan
    given = replace(given, query=query)
    out, lse = agree(given, isa, names_of(variant)) if dtype == "float32" else attend(given)
    for b, (rows, keys) in enumerate(zip(query_lengths, KV_LENGTHS, strict=True)):
        assert not out[b, :, rows:].any()
        assert (lse[b, :, rows:] == -np.inf).all()
        same((out[b, :, :rows], lse[b, :, :rows]), single(given, b, rows, keys), f"sequence {b}, {rows} x {keys}")


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize("seq_q", [1, 3, 64])
def test_masks_are_trimmed_with_their_keys(seq_q: int, kind: str, isa: str) -> None:
    given = ragged(seq_q, "float32")
    mask = rules.random_mask(np.random.default_rng(0), (len(KV_LENGTHS), 2, seq_q, 700), kind)
    out, lse = agree(replace(given, attn_mask=mask), isa)
    for b, length in enumerate(KV_LENGTHS):
        wanted = single(given, b, seq_q, length, attn_mask=np.ascontiguousarray(mask[b, ..., :length]))
        same((out[b], lse[b]), wanted, f"sequence {b}")


@pytest.mark.parametrize("seq_q", SIZES)
def test_positions_are_trimmed_with_their_keys(seq_q: int, isa: str) -> None:
    rng = np.random.default_rng(seq_q)
    p_i, p_j = rng.integers(0, 700, (8, seq_q)), rng.integers(-50, 700, (8, 700))
    given = replace(ragged(seq_q, "float32"), is_causal=True, query_positions=p_i, key_positions=p_j)
    out, lse = agree(given, isa)
    for b, length in enumerate(KV_LENGTHS):
        wanted = single(given, b, seq_q, length, query_positions=p_i[b], key_positions=p_j[b, :length])
        same((out[b], lse[b]), wanted, f"sequence {b}")


@pytest.mark.parametrize("seq_q", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_number_of_threads(dtype: str, seq_q: int) -> None:
    given = replace(ragged(seq_q, dtype), is_causal=True, causal_alignment="lower_right", window=(300, 0))
    before = gqa_ext.get_num_threads()
    try:
        gqa_ext.set_num_threads(1)
        alone = attend(given)
        for threads in (2, 3, 7):
            gqa_ext.set_num_threads(threads)
            same(attend(given), alone, f"{threads} threads")
    finally:
        gqa_ext.set_num_threads(before)


@pytest.mark.parametrize("seq_q", SIZES)
def test_left_padding(seq_q: int, isa: str) -> None:
    """Absent keys at the left, by key_positions, give the rows of the sequence without them."""
    padding = np.array([0, 3, 128, 500])
    mix = Mix((), batch=4, seq_q=seq_q, seq_k=600)
    given = rules.problem(mix)
    key, value = given.key.copy(), given.value.copy()
    for b, absent in enumerate(padding):
        key[b, :, :absent], value[b, :, :absent] = np.nan, np.nan
    given = replace(given, key=key, value=value, is_causal=True, window=(400, 0))
    p_j = np.arange(600) - padding[:, None]
    p_i = 600 - padding[:, None] - seq_q + np.arange(seq_q)
    out, lse = agree(replace(given, key_positions=p_j, query_positions=p_i), isa)
    for b, absent in enumerate(padding):
        trimmed = (given.query[b], given.key[b, :, absent:], given.value[b, :, absent:])
        wanted, wanted_lse = attend(Problem(*trimmed, is_causal=True, causal_alignment="lower_right", window=(400, 0)))
        np.testing.assert_allclose(out[b], wanted, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(lse[b], wanted_lse, rtol=2e-6, atol=2e-6)


def test_lengths_broadcast_to_the_leading_dimensions(isa: str) -> None:
    """A number for all, one for each sequence, or for each of several leading dimensions."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 3, 4, 5, 8), dtype=np.float32)
    key, value = (rng.standard_normal((2, 3, 2, 40, 8), dtype=np.float32) for _ in range(2))
    for shape in ((), (1,), (3,), (2, 1), (1, 3), (2, 3)):
        lengths = {"kv_lengths": rng.integers(0, 41, shape), "query_lengths": rng.integers(0, 6, shape)}
        agree(Problem(query, key, value, **lengths), isa, f"lengths {shape}")
    agree(Problem(query[0, 0], key[0, 0], value[0, 0], kv_lengths=7), isa)
    agree(Problem(query[0, 0, 0], key[0, 0, 0], value[0, 0, 0], kv_lengths=7, query_lengths=np.int16(2)), isa)


def test_shared_keys_with_lengths_of_their_own(isa: str) -> None:
    """One set of keys for all sequences, each seeing as much of it as its length says."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((3, 4, 2, 8), dtype=np.float32)
    key, value = (rng.standard_normal((1, 2, 300, 8), dtype=np.float32) for _ in range(2))
    agree(Problem(query, key, value, kv_lengths=np.array([300, 5, 129])), isa)
    agree(Problem(query, np.broadcast_to(key, (3, 2, 300, 8)), value, kv_lengths=np.array([0, 5, 129])), isa)


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_past_their_length_are_never_read(dtype: str, isa: str) -> None:
    """They lie in memory without access; a process of its own, as a read would end it."""
    command = [sys.executable, "-X", "faulthandler", __file__, isa, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} after {last}\n{done.stderr[-3000:]}"
    assert last == ["done"]


def half_there(x: Array, length: int) -> Array:
    """x (H, S, D), seen as (1, S, H * D) rows of tokens, of which all past length lie where nothing may be read."""
    heads, size, head_dim = x.shape
    rows = guarded(np.ascontiguousarray(x[:, :length].swapaxes(0, 1)), "end")
    whole = np.lib.stride_tricks.as_strided(rows, (size, heads, head_dim), rows.strides, writeable=False)
    return whole.swapaxes(0, 1)[None]


def sweep(isa: str, dtype: str) -> None:
    """Keys and values of which only the first kv_lengths lie in memory at all."""
    with gqa_ext.testing.use_isa(isa), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seq_q in (1, 3, 20, 70):
            given = rules.problem(Mix((), dtype, batch=1, num_kv_heads=1, seq_q=seq_q, seq_k=5000))
            for length in (1, 2, 7, 16, 63, 127, 128, 129, 513, 1000):
                for variant in VARIANTS:
                    print(isa, dtype, seq_q, length, names_of(variant), flush=True)
                    key, value = half_there(given.key[0], length), half_there(given.value[0], length)
                    part = replace(given, key=key, value=value, kv_lengths=length, **variant)
                    wanted = single(part, 0, seq_q, length)
                    out, lse = attend(part)
                    same((out[0], lse[0]), wanted)
    print("done", flush=True)


if __name__ == "__main__":
    sweep(*sys.argv[1:])
