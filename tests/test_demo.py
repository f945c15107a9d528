"""gqa-ext demo: what it prints is what was measured, and it runs as a stranger runs it."""

import dataclasses
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import reference

from gqa_ext import KVCache, __main__, demo, llama

SMALL = {"text": b"A short text that costs little time.\n" * 8, "num_keys": 300}


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gqa_ext", *words],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> llama.Llama:
    return llama.load()


@pytest.fixture(scope="module")
def report(model) -> demo.Report:
    return demo.run(model, **SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """The whole command, piped, in a locale that knows nothing but ASCII."""
    return command("demo", cwd=tmp_path_factory.mktemp("elsewhere"), PYTHONIOENCODING="ascii:strict")


def test_the_command_ends_well_and_prints_a_tidy_table(finished):
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.isascii()
    assert max(map(len, finished.stdout.splitlines())) <= 80
    table = [line.split() for line in finished.stdout.splitlines() if "to one" in line]
    assert [(words[0], words[1]) for words in table] == [("8", "MHA,"), ("4", "GQA,"), ("2", "GQA,"), ("1", "MQA,")]


def test_the_three_lines_do_the_same(finished, monkeypatch, capsys):
    printed = finished.stdout.split("The same in a notebook:\n\n")[1]
    assert len(printed.splitlines()) == 3
    monkeypatch.setattr(demo, "WINDOWS", 2)
    exec("\n".join(line.removeprefix("  ") for line in printed.splitlines()), {})
    again = capsys.readouterr().out
    assert [line[:45] for line in again.splitlines() if "to one" in line] == [
        line[:45] for line in finished.stdout.splitlines() if "to one" in line
    ]
    assert again.split("continues")[1].split("Largest")[0] == finished.stdout.split("continues")[1].split("Largest")[0]


def test_rows_are_what_the_models_are(model, report):
    config = model.config
    width = config.num_hidden_layers * config.head_dim
    for row in report.rows:
        dropped = config.num_attention_heads - row.num_kv_heads
        assert row.kv_bytes == 2 * 4 * width * row.num_kv_heads
        assert row.parameters == model.num_parameters - 2 * dropped * width * config.hidden_size
        assert row.bits_per_byte == model.pooled(row.num_kv_heads).bits_per_byte(SMALL["text"])
        assert row.decode_ms > 0
    assert [row.num_kv_heads for row in report.rows] == [8, 4, 2, 1]
    assert (report.num_keys, report.num_bytes) == (300, len(SMALL["text"]))


def test_the_text_is_the_models(model, report):
    wanted = bytes(model.generate(demo.PROMPT, demo.NEW_BYTES, temperature=demo.TEMPERATURE))
    assert report.text.encode("ascii") == wanted


def test_decoding_is_timed_at_the_context_it_names(model, monkeypatch):
    shapes = []
    attend = KVCache.attend

    def spy(cache, query, **rules):
        shapes.append((query.shape[-2], *cache.lengths))
        return attend(cache, query, **rules)

    monkeypatch.setattr(KVCache, "attend", spy)
    demo.decode_times([model], 70)
    assert set(shapes) == {(1, 71)}


def test_the_oracle_is_the_tests_oracle():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, heads, size, 16)) for heads, size in ((6, 5), (2, 9), (2, 9)))
    wanted = reference.attention(query, key, value, is_causal=True, causal_alignment="lower_right").out
    np.testing.assert_allclose(demo.oracle(query, key, value), wanted, atol=1e-13)


def test_the_difference_from_the_oracle_is_measured(model, report):
    assert 0 < report.largest_error < 4 * report.numpy_error
    assert report.numpy_error < 1e-4 * report.largest_output

    def wrong(*operands, **rules):
        return model.attention(*operands, scale=0.2, **rules)

    error, numpy_error, _ = demo.compare_with_oracle(dataclasses.replace(model, attention=wrong), SMALL["text"])
    assert error > 100 * numpy_error


def test_a_reader_that_leaves_causes_no_traceback(tmp_path):
    """As in `gqa-ext demo | head -n 1`, with more output than a pipe holds."""
    program = (
        "import sys; from gqa_ext import __main__, demo; "
        "demo.run = lambda: 'x' * 10**6; sys.exit(__main__.main(['demo']))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    running.stdout.close()
    _, complaint = running.communicate(timeout=60)
    assert (running.returncode, complaint) == (1, b"")


@pytest.mark.parametrize("words", [[], ["nonsense"], ["demo", "--nonsense"]])
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(words)
    assert stop.value.code == 2
    assert "usage: gqa-ext" in capsys.readouterr().err


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_interrupt_exits_with_130(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert __main__.main(["demo"]) == 130


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor in the shell's way")
def test_a_closed_standard_output_is_no_error(tmp_path):
    script = """
import sys
from gqa_ext import __main__, demo
demo.run = lambda: "report"
assert sys.stdout is None
sys.exit(__main__.main(["demo"]))
"""
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, script],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_script(tmp_path):
    script = Path(sysconfig.get_path("scripts")) / "gqa-ext"
    if not script.exists():
        pytest.skip("gqa_ext is on the path but not installed")
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: gqa-ext")
