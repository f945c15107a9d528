"""A prefix that a batch shares, attended once and merged, equals attention over the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import rows
from reference import attention

from gqa_ext import KVCache, get_alibi_slopes, merge_attention

DOCS = Path(__file__).resolve().parent.parent / "docs" / "prefix-sharing.md"


@pytest.mark.skipif(not DOCS.is_file(), reason="a source distribution carries the tests but not the docs")
def test_the_example_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    printed = capsys.readouterr().out
    assert printed.split(" off")[1] == shown.split(" off")[1]
    assert np.abs(names["out"] - names["dense"]).max() < 1e-6
    wanted = attention(names["query"], names["key"], names["value"]).out
    np.testing.assert_allclose(names["out"], wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("prompt", "lengths"), [(300, [7, 1, 3]), (1, [0, 5, 2]), (2100, [140, 2, 60])])
def test_equals_the_dense_result(prompt: int, lengths: list[int], dtype: str) -> None:
    """Ragged answers, positions that ALiBi tells apart, a sink counted once."""
    batch, longest = len(lengths), max(lengths)
    query = rows(0, batch, 4, 1, 16, dtype=dtype)
    shared = [rows(i, 1, 2, prompt, 16, dtype=dtype) for i in (1, 2)]
    single = [rows(i, batch, 2, longest, 16, dtype=dtype) for i in (3, 4)]
    prefix, own = KVCache(1, 2, 16, capacity=prompt, dtype=dtype), KVCache(batch, 2, 16, capacity=longest, dtype=dtype)
    prefix.append(*shared)
    own.append(*single, lengths)
    slopes = get_alibi_slopes(4)
    places = prompt + np.array(lengths) - 1
    parts = [
        prefix.attend(query.transpose(2, 1, 0, 3), is_causal=False, query_positions=places, alibi_slopes=slopes,
                      return_lse=True),
        own.attend(query, query_positions=places[:, None] - prompt, alibi_slopes=slopes, sinks=np.ones(4),
                   return_lse=True),
    ]  # fmt: skip
    outs = [parts[0][0].transpose(2, 1, 0, 3), parts[1][0]]
    out, lse = merge_attention(outs, [parts[0][1].transpose(2, 1, 0), parts[1][1]])
    whole = [np.concatenate([np.repeat(a, batch, 0), b], 2) for a, b in zip(shared, single, strict=True)]
    wanted = attention(query, *whole, is_causal=True, causal_alignment="lower_right", alibi_slopes=slopes,
                       sinks=np.ones(4), kv_lengths=prompt + np.array(lengths))  # fmt: skip
    close = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), wanted.out, atol=close, rtol=close)
    np.testing.assert_allclose(lse, wanted.lse, atol=1e-4)
