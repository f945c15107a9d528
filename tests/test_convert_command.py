"""`gqa-ext convert`: flags, exit codes, output; the same bytes as the call."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import contents, write_model

from gqa_ext.__main__ import main
from gqa_ext.convert import ConversionReport, convert_checkpoint


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("flags", "choices"),
    [
        (["--num-kv-heads", 2], {"num_kv_heads": 2}),
        (["--num-kv-heads", 4, "--method", "first"], {"num_kv_heads": 4, "method": "first"}),
        (
            ["--num-kv-heads", 2, "--layers", "0-1", "--output", "expanded", "--max-memory", 30_000_000],
            {"num_kv_heads": 2, "layers": [0, 1], "output": "expanded"},
        ),
        (["--num-kv-heads", "8,4,2", "--output", "expanded"], {"num_kv_heads": [8, 4, 2], "output": "expanded"}),
        (
            ["--num-kv-heads", 2, "--groups", '{"1": [[0, 2, 4, 6], [1, 3, 5, 7]]}'],
            {"num_kv_heads": 2, "groups": {1: [[0, 2, 4, 6], [1, 3, 5, 7]]}},
        ),
    ],
)
def test_same_words_same_bytes(tmp_path, capsys, flags, choices) -> None:
    src = write_model(tmp_path / "src", shards=2)
    assert run(src, tmp_path / "dst", *flags, "--json") == 0
    out, err = capsys.readouterr()
    report = ConversionReport.from_dict(json.loads(out))
    assert "B/s" in err
    wanted = convert_checkpoint(src, tmp_path / "call", progress=False, **choices)
    assert contents(tmp_path / "dst") == contents(tmp_path / "call")
    assert (report.files, report.layers) == (wanted.files, wanted.layers)


def test_dry_run_writes_nothing_and_tells_the_bytes(tmp_path, capsys) -> None:
    src, dst = write_model(tmp_path / "src", shards=2), tmp_path / "dst"
    assert run(src, dst, "--num-kv-heads", 2, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert len(plan["pooled"]) == 6
    assert plan["left_out"] == ["pytorch_model.bin"]
    assert run(src, dst, "--num-kv-heads", 2, "--dry-run") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in plan["pooled"] + plan["copied"] + plan["files"])
    assert run(src, dst, "--num-kv-heads", 2) == 0
    assert sum(map(len, contents(dst).values())) == plan["bytes_after"]
    before = sum(map(len, contents(src).values())) - len(b"other weights")
    assert plan["bytes_before"] == before
    assert set(plan["files"]) == set(contents(dst))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--num-kv-heads", 3], "num_kv_heads"),
        (["--num-kv-heads", 2, "--layers", "7"], "layers"),
        (["--num-kv-heads", 2, "--max-memory", 5], "max_memory"),
        (["--num-kv-heads", 2, "--groups", "[[0]]"], "groups"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_bad_input_is_one_line_and_1(tmp_path, capsys, flags, wanted, dry) -> None:
    src = write_model(tmp_path / "src")
    assert run(src, tmp_path / "dst", *flags, *(["--dry-run"] if dry else [])) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert wanted in err
    assert not (tmp_path / "dst").exists()


def test_files_that_are_not_there_or_in_the_way(tmp_path, capsys) -> None:
    src, dst = write_model(tmp_path / "src"), tmp_path / "dst"
    assert run(tmp_path / "none", dst, "--num-kv-heads", 2) == 1
    assert "none" in capsys.readouterr().err
    assert run(src, dst, "--num-kv-heads", 2) == 0
    capsys.readouterr()
    assert run(src, dst, "--num-kv-heads", 4) == 1
    err = capsys.readouterr().err
    assert (err.count("\n"), "Errno" in err, "overwrite" in err) == (1, False, True)
    assert run(src, dst, "--num-kv-heads", 4, "--overwrite") == 0
    capsys.readouterr()
    assert run(dst, tmp_path / "further", "--num-kv-heads", 2) == 1
    assert "allow_gqa" in capsys.readouterr().err
    assert run(dst, tmp_path / "further", "--num-kv-heads", 2, "--allow-gqa") == 0


@pytest.mark.parametrize(
    "flags",
    [[], ["--num-kv-heads", "x"], ["--num-kv-heads", 2, "--method", "max"], ["--num-kv-heads", 2, "--layers", "3-1"],
     ["--num-kv-heads", 2, "--groups", "{"]],
)  # fmt: skip
def test_usage_is_2(tmp_path, flags) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "dst", *flags)
    assert caught.value.code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupted_is_130(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    with open(src / "notes.txt", "wb") as file:  # so much that the signal comes before the end
        file.truncate(90_000_000)
    command = [sys.executable, "-m", "gqa_ext", "convert", str(src), str(tmp_path / "dst"), "--num-kv-heads", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
    while not (tmp_path / ".dst.gqa-ext").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "dst").exists()
