"""gqa-ext bench: its counts against formulas of their own, its tables and its plot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gqa_ext
from gqa_ext import __main__, bench

SMALL = bench.Sizes(num_heads=8, head_dim=16, embed_dim=64, prefill=32, contexts=(48, 96), rounds=1)


@pytest.fixture(scope="module")
def result() -> bench.Result:
    return bench.run(SMALL)


def test_counts_of_the_layer(result: bench.Result) -> None:
    assert [row.num_kv_heads for row in result.layer] == [8, 4, 2, 1]
    for row in result.layer:
        module = gqa_ext.GroupedQueryAttention(64, 8, row.num_kv_heads, head_dim=16)
        cache = gqa_ext.KVCache(1, row.num_kv_heads, 16, capacity=10, dtype="float16")
        assert row.parameters == module.num_parameters()
        assert row.kv_bytes == cache.nbytes // 10
        assert row.prefill_ms > 0
        assert len(row.decode_us) == 2


def test_counts_of_the_model(result: bench.Result) -> None:
    model = gqa_ext.llama.load()
    assert result.model_heads == model.config.num_attention_heads
    for row in result.model:
        assert row.parameters == model.pooled(row.num_kv_heads).num_parameters
        assert row.kv_bytes * model.config.num_key_value_heads == result.model[0].kv_bytes * row.num_kv_heads
    losses = [row.bits_per_byte for row in result.model]
    assert losses == sorted(losses)  # pooling without training loses something each time


def test_tables(result: bench.Result) -> None:
    text, markdown = str(result), result.markdown()
    for name in ("8 (MHA)", "4 (GQA)", "1 (MQA)", "decode at 96", "bits per byte"):
        assert name in text
        assert name in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 + 2 + 4
    assert {line.count("|") for line in rows[:6]} == {7}


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot(result: bench.Result, ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / f"table.{ending}")
    assert (tmp_path / f"table.{ending}").read_bytes()[:4] in (b"<?xm", b"\x89PNG")


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "Sizes", lambda **_: SMALL)
    assert __main__.main(["bench", "--markdown", "--quick"]) == 0
    assert "| 8 (MHA) |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "run", lambda sizes: 1 / 0)  # a bad name is seen before anything is measured
    for name, words in ("missing/x.svg", "make .*missing first"), ("x.docx", r"x.docx ends in .docx; one of .*\.svg"):
        assert __main__.main(["bench", "--plot", str(tmp_path / name)]) == 1
        assert re.search(rf"^gqa-ext bench\(\): .*{words}", capsys.readouterr().err.removeprefix("gqa-ext bench: "))


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, result: bench.Result) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ImportError, match=r"pip install \"gqa-ext\[plot\]\""):
        result.plot("x.svg")
