"""convert_checkpoint: killed at any moment, it goes on and ends in the same bytes."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import contents, write_model

from gqa_ext.convert import convert_checkpoint
from gqa_ext.convert.tasks import run_task

KILLS = 30


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", shards=6)


def convert(src: Path, dst: Path, num_kv_heads: int = 2, **more: object):
    return convert_checkpoint(src, dst, num_kv_heads, progress=False, **more)


def in_child(run, delay: float | None) -> float:
    """Run in a forked child and kill it after `delay` seconds; returns what it took."""
    started = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    if delay is not None:
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return time.monotonic() - started


@pytest.mark.parametrize("kind", ["new", "empty", "overwrite"])
def test_killed_at_random_moments(src, tmp_path, kind) -> None:
    convert(src, tmp_path / "want")
    want = contents(tmp_path / "want")
    duration = in_child(lambda: convert(src, tmp_path / "measured"), None)
    rng = random.Random(kind)
    resumed = 0
    for i in range(KILLS // 3):
        dst = tmp_path / f"dst{i}"
        if kind != "new":
            dst.mkdir()
        if kind == "overwrite":
            (dst / "config.json").write_text("old")
            (dst / "model.safetensors").write_text("old")
        overwrite = kind == "overwrite"
        in_child(lambda dst=dst, o=overwrite: convert(src, dst, overwrite=o), rng.random() * duration)
        if (dst / "config.json").exists() and not overwrite:  # config comes last, so all is there
            assert {name: contents(dst)[name] for name in want} == want
        try:
            resumed += bool(convert(src, dst, overwrite=overwrite).resumed)
        except FileExistsError:  # it was done before it was killed
            assert kind != "overwrite"
        assert contents(dst) == want
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def stopped_after(src: Path, dst: Path, shards: int, **more: object) -> None:
    """Leave a run as a kill would, with so many shards finished."""

    def run() -> None:
        work = dst.parent / f".{dst.name}.gqa-ext"

        def die(done: int, total: int) -> None:
            if len(list(work.glob("*/files/*.safetensors"))) >= shards:
                os.kill(os.getpid(), signal.SIGKILL)

        convert_checkpoint(src, dst, 2, **({"progress": die} | more))

    in_child(run, None)
    assert not dst.exists()


def test_finished_shards_are_kept(src, tmp_path) -> None:
    dst = tmp_path / "dst"
    stopped_after(src, dst, 2)
    kept = {path.name: path.stat().st_ino for path in tmp_path.glob(".dst.gqa-ext/*/files/*")}
    assert len(kept) >= 2
    report = convert(src, dst)
    assert set(report.resumed) == kept.keys()
    assert {name: (dst / name).stat().st_ino for name in kept} == kept
    whole = convert(src, tmp_path / "whole")
    assert (report.files, report.layers) == (whole.files, whole.layers)
    assert contents(dst) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src", "whole"]


def test_a_shard_that_rotted_is_made_again(src, tmp_path) -> None:
    stopped_after(src, tmp_path / "dst", 2)
    for path in tmp_path.glob(".dst.gqa-ext/*/files/*"):
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    assert convert(src, tmp_path / "dst").resumed == ()
    convert(src, tmp_path / "whole")
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


OTHERS = [{"num_kv_heads": 4}, {"method": "first"}, {"output": "expanded"}, {"layers": [0, 1, 2]}]


@pytest.mark.parametrize("other", OTHERS)
def test_another_plan_never_takes_over_shards(src, tmp_path, other) -> None:
    stopped_after(src, tmp_path / "dst", 2)
    report = convert(src, tmp_path / "dst", **other)
    same = other == {"layers": [0, 1, 2]}  # another way to say the same
    assert bool(report.resumed) == same
    convert(src, tmp_path / "whole", **other)
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src", "whole"]


@pytest.mark.parametrize("name", ["model-00003-of-00006.safetensors", "tokenizer.json"])
def test_a_changed_source_never_takes_over_shards(src, tmp_path, name) -> None:
    stopped_after(src, tmp_path / "dst", 2)
    status = (src / name).stat()
    data = bytearray((src / name).read_bytes())
    data[-2] ^= 1
    (src / name).write_bytes(data)
    os.utime(src / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync does
    assert convert(src, tmp_path / "dst").resumed == ()
    convert(src, tmp_path / "whole")
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")


def test_a_source_that_changes_on_the_way_is_refused(src, tmp_path, monkeypatch) -> None:
    def run_late(task, tick=None):
        os.utime(src / "model-00006-of-00006.safetensors")
        return run_task(task, tick)

    monkeypatch.setattr("gqa_ext.convert.execute.run_task", run_late)
    with pytest.raises(ValueError, match=r"of-00006\.safetensors: the file changed"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_destination_in_work_is_refused(src, tmp_path, exists) -> None:
    dst, inside, go = tmp_path / "dst", threading.Event(), threading.Event()
    if exists:
        dst.mkdir()

    def wait(done: int, total: int) -> None:
        inside.set()
        go.wait()

    first = threading.Thread(target=lambda: convert_checkpoint(src, dst, 2, progress=wait))
    first.start()
    try:
        assert inside.wait(20)
        with pytest.raises(FileExistsError, match="another run is writing"):
            convert(src, dst)
        code = "from gqa_ext.convert import convert_checkpoint\n"
        code += f"convert_checkpoint({str(src)!r}, {str(dst)!r}, 4, overwrite=True)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "FileExistsError" in other.stderr
        assert "another run is writing" in other.stderr
    finally:
        go.set()
        first.join()
    convert(src, tmp_path / "whole")
    assert contents(dst) == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", range(1, 14))
def test_killed_between_any_two_renames(src, tmp_path, step) -> None:
    """The last steps one by one: each file of the result is renamed into a folder that is there."""
    dst = tmp_path / "dst"
    dst.mkdir()
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        (dst / name).write_text("{}")

    def run() -> None:
        replace, left = os.replace, [step]

        def counted(old, new) -> None:
            if Path(new).parent == dst:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)

        os.replace = counted
        convert(src, dst, overwrite=True)

    in_child(run, None)
    assert not (dst / "config.json").exists() or step > 11  # nobody loads a mixture
    convert(src, dst, overwrite=True)
    convert(src, tmp_path / "whole")
    assert contents(dst) == contents(tmp_path / "whole")
