"""convert_checkpoint: what it refuses to read, by name, before it reads data or writes."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import contents, llama, write_model
from safetensors.numpy import load_file, save_file

from gqa_ext.convert import convert_checkpoint, pool_heads

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", shards=2)


def refused(src: Path, error: type[Exception], match: str, num_kv_heads: object = 2, **more: object) -> None:
    """The call raises, changes nothing and creates nothing."""
    parent = src.parent if src.name == "src" else src.parent.parent
    before = contents(parent)
    with pytest.raises(error, match=match):
        convert_checkpoint(src, parent / "new" / "dst", num_kv_heads, **({"progress": False} | more))
    assert contents(parent) == before
    assert not (parent / "new").exists()


def edit_index(src: Path, **weight_map: object) -> None:
    index = json.loads((src / INDEX).read_text())
    index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
    (src / INDEX).write_text(json.dumps(index))


def test_what_is_missing(src, tmp_path) -> None:
    refused(tmp_path / "src" / "nowhere", FileNotFoundError, "nowhere does not exist")
    (src / SHARD).rename(tmp_path / "shard")
    refused(src, FileNotFoundError, f"{SHARD} does not exist")
    (src / SHARD).symlink_to(tmp_path / "gone")
    refused(src, FileNotFoundError, f"{SHARD} is a link to a file that is not there")
    (src / SHARD).unlink()
    (tmp_path / "shard").rename(src / SHARD)
    (src / "config.json").unlink()
    refused(src, FileNotFoundError, "config.json does not exist")


def test_a_folder_without_weights(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    (src / "model.safetensors").unlink()
    (src / "pytorch_model.bin").unlink()
    refused(src, FileNotFoundError, "neither model.safetensors nor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused_with_the_line_that_saves_them_again(tmp_path, name) -> None:
    src = write_model(tmp_path / "src")
    for file in ("model.safetensors", "pytorch_model.bin"):
        (src / file).unlink()
    (src / name).write_bytes(b"\x80\x04.")
    for path in (src, src / name):
        refused(path, ValueError, f"{name} is a pickle.*save it again: python -c")


def test_the_line_that_saves_a_pickle_again_works(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    src = write_model(tmp_path / "src")
    (src / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(array) for name, array in llama().items()}, src / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save it again") as raised:
        convert_checkpoint(src, tmp_path / "dst", 2)
    assert os.system(str(raised.value).partition("again: ")[2].replace("python", f"exec {sys.executable}", 1)) == 0
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    assert load_file(src / "pytorch_model.safetensors").keys() == llama().keys()


HOSTILE = ["../src/x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", "C:x"]
HOSTILE += [3, None, ["x"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_name_never_leaves_the_folder(src, name) -> None:
    edit_index(src, model__norm__weight=name)
    refused(src, ValueError, f"{INDEX}: tensor 'model.norm.weight': its shard is .*plain file name")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not sound JSON"),
        ("[1]", "a JSON object"),
        ("[" * 100_000, "not sound JSON"),
        ("{}", "weight_map is None"),
        ('{"weight_map": []}', r"weight_map is \[\]"),
        ('{"weight_map": {}}', "weight_map is {}"),
    ],
)
def test_a_broken_index(src, text, match) -> None:
    (src / INDEX).write_text(text)
    refused(src, ValueError, f"{INDEX}.*{match}")


def test_an_index_and_shards_that_disagree(src, tmp_path) -> None:
    edit_index(src, no__such=SHARD)
    refused(src, ValueError, f"{INDEX}: tensor 'no.such' is not in {SHARD}")
    src = write_model(tmp_path / "two" / "src", shards=2)
    tensors = load_file(src / SHARD)
    save_file(tensors | load_file(src / SHARD.replace("00001", "00002", 1)), src / SHARD)
    refused(src, ValueError, "is also in model-0000")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a":' * 100_000])
def test_a_broken_config(src, text) -> None:
    (src / "config.json").write_bytes(text)
    refused(src, ValueError, "config.json")


@pytest.mark.parametrize("name", ["config.json", SHARD, INDEX, "tokenizer.json"])
def test_pipes_and_folders_are_no_files(src, name) -> None:
    (src / name).unlink()
    os.mkfifo(src / name)
    if name == "tokenizer.json":  # not needed, so it stays
        assert convert_checkpoint(src, src.parent / "dst", 2, progress=False).skipped == ("pytorch_model.bin", name)
        return
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
        convert_checkpoint(src, src.parent / "dst", 2)
    (src / name).unlink()
    (src / name).mkdir()
    refused(src, ValueError, f"{name} is no regular file")


def test_errors_of_the_plan_name_file_and_tensor(src, tmp_path) -> None:
    refused(src, ValueError, r"convert_checkpoint\(\): .*config.json: num_kv_heads is 3", 3)
    name = "model.layers.1.self_attn.k_proj.weight"
    shard = next(path for path in src.glob("*.safetensors") if name in load_file(path))
    save_file(load_file(shard) | {name: np.ones((32, 32), np.int8)}, shard)
    refused(src, ValueError, f"{shard.name}: tensor {name} has dtype I8")
    save_file(load_file(shard) | {name: np.ones((30, 32), "f4")}, shard)
    refused(src, ValueError, f"{shard.name}: tensor {name} has shape")


def test_only_headers_are_read_before_a_refusal(tmp_path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8}))
    entry = {"dtype": "F32", "shape": [1 << 30, 1 << 10], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": entry}).encode()
    with open(src / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 42))
    with pytest.raises(ValueError, match=r"model\.safetensors|config\.json"):
        convert_checkpoint(src, tmp_path / "dst", 2)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("max_memory", 1000, ValueError, "max_memory is 1000; at least"),
        ("max_memory", 1e9, TypeError, "max_memory is .*a float"),
        ("max_memory", True, TypeError, "max_memory is True"),
        ("executor", 4, TypeError, "executor is 4, an int; an object with submit"),
        ("progress", 4, TypeError, "progress is 4, an int"),
        ("overwrite", 1, TypeError, "overwrite is 1, an int"),
        ("method", "median", ValueError, "method is 'median'"),
        ("output", "gqa", ValueError, "output is 'gqa'"),
    ],
)
def test_arguments(src, argument, value, error, match) -> None:
    refused(src, error, match, **{argument: value})


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_an_npz_becomes_a_safetensors_file(tmp_path, dtype) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"{name}_proj.weight": rng.standard_normal((32, 32)).astype(dtype) for name in ("q", "k", "v", "out")}
    tensors |= {"flag": np.array([True, False]), "empty": np.empty((0, 3)), "steps": np.array(7)}
    np.savez(tmp_path / "attention.npz", **tensors)
    report = convert_checkpoint(tmp_path / "attention.npz", tmp_path / "dst", 2, num_heads=8, progress=False)
    new = load_file(tmp_path / "dst" / "attention.safetensors")
    assert list(report.files) == ["attention.safetensors"]
    assert new.keys() == tensors.keys()
    for name, array in tensors.items():
        want = pool_heads(array, 8, 2) if name[:2] in ("k_", "v_") else array
        assert (new[name].dtype, new[name].tobytes()) == (want.dtype, want.tobytes())


def test_an_npz_that_cannot_be_read_as_it_lies(tmp_path) -> None:
    sound = {f"{name}_proj.weight": np.ones((32, 32), "f4") for name in ("q", "k", "v", "out")}
    src = tmp_path / "src"
    src.mkdir()
    bad = {
        "compressed": lambda path: np.savez_compressed(path, **sound),
        "pickled objects": lambda path: np.savez(path, **(sound | {"x": np.array([{}])})),
        "order": lambda path: np.savez(path, **(sound | {"x": np.ones((2, 3), order="F")})),
        "big-endian": lambda path: np.savez(path, **(sound | {"x": np.ones(3, ">f4")})),
        "no sound": lambda path: path.write_bytes(b"PK\x03\x04 or so"),
        "dtype": lambda path: np.savez(path, **(sound | {"x": np.array(["text"])})),
    }
    for match, make in bad.items():
        make(src / "a.npz")
        with pytest.raises(ValueError, match=rf"a\.npz: .*{match}"):
            convert_checkpoint(src / "a.npz", tmp_path / "dst", 2, num_heads=8)
        assert not (tmp_path / "dst").exists()


def test_damaged_npz_files(tmp_path) -> None:
    tensors = {f"{name}_proj.weight": np.ones((8, 8), "f4") for name in ("q", "k", "v", "out")}
    np.savez(tmp_path / "sound.npz", **tensors)
    data, rng = (tmp_path / "sound.npz").read_bytes(), np.random.default_rng(1)
    for i in range(300):
        broken = bytearray(data)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        (tmp_path / "a.npz").write_bytes(broken[: rng.integers(len(broken))] if i % 3 == 0 else broken)
        try:
            convert_checkpoint(tmp_path / "a.npz", tmp_path / f"dst{i}", 2, num_heads=8, progress=False)
        except ValueError as error:
            assert not (tmp_path / f"dst{i}").exists(), error  # noqa: PT017
