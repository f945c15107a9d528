"""Results are the same bits for any number of threads, alone or in a batch, and with later keys appended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gqa_ext

Array = NDArray[Any]
DTYPES = ("float32", "float64", "bfloat16")
# Few rows and many; one key split and several; more row tiles than one unit holds.
SIZES = [(1, 6500), (3, 4200), (11, 130), (60, 2200), (450, 300)]
LONG = [(1, 40_000), (5, 9_001), (70, 5_000)]  # of one head: only its keys can be shared out


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = gqa_ext.get_num_threads()
    yield
    gqa_ext.set_num_threads(before)


def arrays(dtype: str, batch: int, seq_q: int, seq_k: int, num_kv_heads: int = 2) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng([seq_q, seq_k])
    shapes = ((batch, 2 * num_kv_heads, seq_q, 24), (batch, num_kv_heads, seq_k, 24), (batch, num_kv_heads, seq_k, 17))
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return query, key, value


def attend(*given: Array, **rules: Any) -> tuple[Array, Array]:
    return gqa_ext.scaled_dot_product_attention(*given, **rules, return_lse=True)


def same(a: tuple[Array, Array], b: tuple[Array, Array]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        different = np.flatnonzero((x != y).ravel())
        assert x.tobytes() == y.tobytes(), f"{different.size} of {x.size} differ, first at {different[:1]}"


def rules_of(seq_q: int, seq_k: int) -> list[dict[str, Any]]:
    keep = np.random.default_rng(0).random((seq_q, seq_k)) < 0.5
    return [{}, {"is_causal": True, "causal_alignment": "lower_right"}, {"attn_mask": keep}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES + LONG)
def test_any_number_of_threads(seq_q: int, seq_k: int, dtype: str, isa: str) -> None:
    given = arrays(dtype, 2, seq_q, seq_k) if (seq_q, seq_k) in SIZES else arrays(dtype, 1, seq_q, seq_k, 1)
    for rules in rules_of(seq_q, seq_k):
        gqa_ext.set_num_threads(1)
        alone = attend(*given, **rules)
        for threads in (2, 3, 8):
            gqa_ext.set_num_threads(threads)
            for _ in range(3):
                same(attend(*given, **rules), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
def test_alone_or_in_a_batch(seq_q: int, seq_k: int, dtype: str, isa: str) -> None:
    query, key, value = arrays(dtype, 5, seq_q, seq_k)
    for rules in rules_of(seq_q, seq_k):
        out, lse = attend(query, key, value, **rules)
        for b in (0, 3, 4):
            same(attend(query[b : b + 1], key[b : b + 1], value[b : b + 1], **rules), (out[b : b + 1], lse[b : b + 1]))
        same(attend(query[2], key[2], value[2], **rules), (out[2], lse[2]))
        same(attend(query[1:3], key[1:3], value[1:3], **rules), (out[1:3], lse[1:3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("seq_q", [9, 48, 100])
def test_wherever_rows_lie(seq_q: int, head_dim: int, dtype: str, isa: str) -> None:
    """Heads before or behind rows, rows with gaps, out= or in the query's own place, with or without the LSE."""
    rng = np.random.default_rng(seq_q)
    query, key, value = (rng.standard_normal((2, h, seq_q, head_dim)).astype(dtype) for h in (8, 2, 2))
    for group in (4, 1):
        q = query[:, : 2 * group]
        wanted = attend(q, key, value, is_causal=True)[0].tobytes()
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)):
            moved = np.zeros([(*q.shape[:3], head_dim + 2)[axis] for axis in order], q.dtype).transpose(
                np.argsort(order)
            )
            for place in (moved[..., :head_dim], moved[..., 1:-1]):
                place[:] = q
                gqa_ext.scaled_dot_product_attention(place, key, value, is_causal=True, out=place)
                assert np.ascontiguousarray(place).tobytes() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_q", [1, 3, 11, 127, 128, 129, 450])
def test_later_keys_appended_under_causal(seq_q: int, dtype: str, isa: str) -> None:
    """What comes after the last row changes nothing, be it garbage, and however much."""
    query, key, value = arrays(dtype, 1, seq_q, seq_q + 1300)
    key[:, :, seq_q + 7 :], value[:, :, seq_q + 7 :] = np.nan, np.inf
    rules = {"is_causal": True, "causal_alignment": "upper_left"}
    alone = attend(query, key[:, :, :seq_q], value[:, :, :seq_q], **rules)
    same(attend(query, key[:, :, :seq_q], value[:, :, :seq_q], is_causal=True, causal_alignment="lower_right"), alone)
    for extra in (1, 7, 121, 128, 500, 513, 1300):
        same(attend(query, key[:, :, : seq_q + extra], value[:, :, : seq_q + extra], **rules), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concurrent_callers(dtype: str) -> None:
    """Calls from several Python threads at once get what each gets alone."""
    problems = [arrays(dtype, 2, seq_q, seq_k) for seq_q, seq_k in SIZES]
    alone = [attend(*given) for given in problems]
    failures: list[str] = []

    def work(offset: int) -> None:
        for turn in range(3 * len(problems)):
            i = (turn + offset) % len(problems)
            if any(x.tobytes() != y.tobytes() for x, y in zip(attend(*problems[i]), alone[i], strict=True)):
                failures.append(f"problem {i} in thread {offset}")

    workers = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
