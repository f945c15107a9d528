"""convert_checkpoint: where it writes, and where it never does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from checkpoints import contents, write_model
from safetensors.numpy import load_file, save_file

from gqa_ext.convert import convert_checkpoint


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", shards=2)


def convert(src: Path, dst: object, num_kv_heads: int = 2, **more: object):
    return convert_checkpoint(src, dst, num_kv_heads, progress=False, **more)


def beside(dst: Path) -> list[str]:
    return sorted(path.name for path in dst.parent.iterdir())


def test_missing_parents_and_empty_folders_are_fine(src, tmp_path) -> None:
    convert(src, tmp_path / "a" / "b" / "dst")
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    convert(src, str(empty) + "/")
    assert contents(empty) == contents(tmp_path / "a" / "b" / "dst")
    assert empty.stat().st_mode & 0o777 == 0o700
    assert beside(empty) == ["a", "empty", "src"]
    assert beside(tmp_path / "a" / "b" / "dst") == ["dst"]


def test_a_relative_destination(src, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert("src", "dst")
    assert beside(tmp_path / "dst") == ["dst", "src"]
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    convert("../src", ".")
    assert contents(tmp_path / "in") == contents(tmp_path / "dst")


def test_a_finished_or_foreign_destination_is_refused_and_untouched(src, tmp_path) -> None:
    convert(src, tmp_path / "dst")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    for dst, overwrite in (("dst", False), ("foreign", False), ("file", False), ("file", True)):
        with pytest.raises(FileExistsError, match=dst):
            convert(src, tmp_path / dst, 4, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert beside(tmp_path / "dst") == ["dst", "file", "foreign", "src"]


def test_overwrite_replaces_the_model_and_leaves_foreign_files(src, tmp_path) -> None:
    dst = tmp_path / "dst"
    convert(write_model(tmp_path / "old", shards=3, layers=4), dst)
    for name in ("notes.txt", "adapter_model.safetensors", "pytorch_model.bin", "tokenizer.model"):
        (dst / name).write_text("mine")
    (dst / "runs").mkdir()
    (dst / "runs" / "log.txt").write_text("mine")
    convert(src, dst, 4, overwrite=True)
    convert(src, tmp_path / "fresh", 4)
    mine = {name: data for name, data in contents(dst).items() if data == b"mine"}
    assert len(mine) == 5
    assert contents(dst) == contents(tmp_path / "fresh") | mine
    convert(write_model(tmp_path / "single"), dst, 4, overwrite=True)
    assert [path.name for path in dst.glob("model*")] == ["model.safetensors"]


SELF = ["src", "src/", "src/inside", "src/inside/deeper", "dst/../src", "link", "link/inside", "src/../src/x"]
SELF += ["other/up/x"]


@pytest.mark.parametrize("dst", SELF)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_a_destination(src, tmp_path, dst, overwrite) -> None:
    (tmp_path / "link").symlink_to("src", target_is_directory=True)
    (tmp_path / "other").mkdir()
    (src / "below").mkdir()
    (tmp_path / "other" / "up").symlink_to(src / "below", target_is_directory=True)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"in the source|is a link"):
        convert(src, f"{tmp_path}/{dst}", overwrite=overwrite)
    assert contents(tmp_path) == before
    assert {"inside", "x"}.isdisjoint(os.listdir(src))


def test_a_hub_cache_of_links(src, tmp_path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(src.iterdir())):
        path.rename(blobs / f"{i:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040}")
    before = contents(tmp_path)
    convert(snapshot, tmp_path / "dst")
    assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))
    for dst in (blobs, snapshot, snapshot / "x"):
        with pytest.raises(ValueError, match="source"):
            convert(snapshot, dst, overwrite=True)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_nothing_is_written_through_a_link(src, tmp_path) -> None:
    elsewhere, dst = tmp_path / "elsewhere", tmp_path / "dst"
    elsewhere.mkdir()
    dst.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (elsewhere / name).write_text("precious")
        (dst / name).symlink_to(elsewhere / name)
    convert(src, dst, overwrite=True)
    assert set(contents(elsewhere).values()) == {b"precious"}
    assert not any(path.is_symlink() for path in dst.iterdir())
    (src / "sub").mkdir()
    (src / "sub" / "a.json").write_text("{}")
    (dst / "sub").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ValueError, match="sub is in the way"):
        convert(src, dst, overwrite=True)
    assert not (elsewhere / "a.json").exists()


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_destination_that_is_a_link_is_refused(src, tmp_path, target) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "dst").symlink_to(target, target_is_directory=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a link"):
            convert(src, tmp_path / "dst", overwrite=overwrite)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert not (tmp_path / "nowhere").exists()


def test_a_work_folder_that_is_a_link_is_refused(src, tmp_path) -> None:
    (tmp_path / ".dst.gqa-ext").symlink_to(src, target_is_directory=True)
    before = contents(src)
    with pytest.raises(ValueError, match="in the way"):
        convert(src, tmp_path / "dst")
    assert contents(src) == before


def test_hard_links_to_the_source_are_cut_not_written(src, tmp_path) -> None:
    dst, before = tmp_path / "dst", contents(src)
    dst.mkdir()
    for path in src.iterdir():
        os.link(path, dst / path.name)
    convert(src, dst, overwrite=True)
    assert contents(src) == before
    assert contents(dst)["config.json"] != before["config.json"]
    assert not any(os.path.samefile(path, dst / path.name) for path in src.glob("*.safetensors"))


def test_a_single_file_may_have_its_result_beside_it_but_not_over_it(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    before = contents(src)
    with pytest.raises(ValueError, match="in the source"):
        convert(src / "model.safetensors", src, overwrite=True)
    convert(src / "model.safetensors", src / "gqa")
    assert {name: data for name, data in contents(src).items() if "/" not in name} == before
    outside = tmp_path / "outside"
    outside.mkdir()
    (src / "model.safetensors").rename(outside / "model.safetensors")
    (src / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(ValueError, match="of the source"):
        convert(src, outside, overwrite=True)


def test_a_destination_around_the_source(tmp_path) -> None:
    src = write_model(tmp_path / "dst" / "sub")
    convert(src, tmp_path / "dst", overwrite=True)
    (src / "sub").mkdir()
    (src / "sub" / "tokenizer.json").write_text("would fall on the source's own")
    before = contents(src)
    with pytest.raises(ValueError, match="is the source's"):
        convert(src, tmp_path / "dst", overwrite=True)
    assert contents(src) == before


def limited(src: Path, dst: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, where `code` has made things worse before."""
    call = f"from gqa_ext.convert import convert_checkpoint\nconvert_checkpoint({str(src)!r}, {str(dst)!r}, 2)"
    code = f"{textwrap.dedent(code)}\n{call}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, resource.RLIM_INFINITY))
"""


def test_a_file_that_cannot_be_written_is_an_oserror_and_leaves_nothing(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    before = contents(tmp_path)
    run = limited(src, tmp_path / "dst", FULL.format(20_000))
    assert "OSError: [Errno 27]" in run.stderr
    assert contents(tmp_path) == before
    assert beside(tmp_path / "dst") == ["src"]


def test_finished_shards_wait_after_an_error(tmp_path) -> None:
    src = write_model(tmp_path / "src", shards=6, layers=1)
    norm = src / "model-00002-of-00006.safetensors"
    assert list(load_file(norm)) == ["model.norm.weight"]  # the last in the index
    save_file({"model.norm.weight": np.ones(10_000)}, norm)
    run = limited(src, tmp_path / "dst", FULL.format(20_000))
    assert "OSError" in run.stderr
    assert "the same call goes on from there" in run.stderr
    assert not (tmp_path / "dst").exists()
    report = convert(src, tmp_path / "dst")
    assert report.resumed
    assert beside(tmp_path / "dst") == ["dst", "src"]
    assert report.files == convert(src, tmp_path / "again").files


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_destination(src, tmp_path) -> None:
    (tmp_path / "dst").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        convert(src, tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == []
