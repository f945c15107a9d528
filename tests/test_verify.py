"""verify_checkpoint and `gqa-ext verify`: a sound result passes, every broken promise is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_model
from safetensors.numpy import load_file, save_file

from gqa_ext import llama
from gqa_ext.__main__ import main
from gqa_ext.convert import convert_checkpoint
from gqa_ext.convert.safetensors import SafetensorsFile
from gqa_ext.convert.verify import verify_checkpoint

K = "model.layers.1.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    convert_checkpoint(write_model(folder / "src", shards=2), folder / "dst", 2, progress=False)
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Source and result, the latter free to be broken."""
    shutil.copytree(made / "dst", tmp_path / "dst")
    return made / "src", tmp_path / "dst"


def shard_of(folder: Path, tensor: str) -> Path:
    return next(path for path in folder.glob("*.safetensors") if tensor in SafetensorsFile(path))


def flip(folder: Path, tensor: str, place: int = -1) -> Path:
    """Change one bit of one tensor."""
    path = shard_of(folder, tensor)
    raw = bytearray(path.read_bytes())
    info = SafetensorsFile(path).tensors[tensor]
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + (info.stop if place < 0 else info.start) + place] ^= 1
    path.write_bytes(raw)
    return path


def rewrite(path: Path, tensors: dict[str, np.ndarray] | None = None, **metadata: str) -> None:
    """The file anew, by the safetensors library."""
    old = SafetensorsFile(path).metadata
    save_file(tensors or load_file(path), path, old | metadata)


def broken(src: Path, dst: Path, capsys: pytest.CaptureFixture[str], *names: str) -> None:
    capsys.readouterr()
    assert main(["verify", str(src), str(dst)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert lines
    assert any(all(name in line for name in names) for line in lines), lines


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("output", ["native", "expanded"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_a_sound_result_passes_and_the_choices_are_found(tmp_path, method, output, heads) -> None:
    src = write_model(tmp_path / "src")
    convert_checkpoint(src, tmp_path / "dst", heads, method=method, output=output, progress=False)
    found = verify_checkpoint(src, tmp_path / "dst")
    assert found.faults == []
    assert found.num_kv_heads == [heads] * 3
    if heads < 8:
        assert (found.method, found.output, found.derived) == (method, output, 6)


def test_some_layers_expanded(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    convert_checkpoint(src, tmp_path / "dst", 2, layers=[1], output="expanded", method="first", progress=False)
    found = verify_checkpoint(src, tmp_path / "dst")
    assert (found.faults, found.num_kv_heads, found.method) == ([], [8, 2, 8], "first")


def test_groups_are_given(tmp_path, capsys) -> None:
    src, dst = write_model(tmp_path / "src"), tmp_path / "dst"
    groups = [[0, 7], [1, 6], [2, 5], [3, 4]]
    convert_checkpoint(src, dst, 4, groups=groups, progress=False)
    assert main(["verify", str(src), str(dst), "--groups", json.dumps(groups)]) == 0
    broken(src, dst, capsys, "k_proj")


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("tensor", [K, UP])
def test_one_bit_of_a_tensor(pair, capsys, tensor, place) -> None:
    src, dst = pair
    path = flip(dst, tensor, place)
    broken(src, dst, capsys, path.name, tensor)


def test_an_extra_and_a_missing_tensor(pair, capsys) -> None:
    src, dst = pair
    path = shard_of(dst, UP)
    tensors = load_file(path)
    tensors["spare"] = tensors.pop(UP)
    rewrite(path, tensors)
    broken(src, dst, capsys, path.name, "spare")
    broken(src, dst, capsys, path.name, UP, "missing")


def test_reordered_tensors(pair, capsys) -> None:
    """The data stays sound: only the order of two tensors of one size changes."""
    src, dst = pair
    path = shard_of(dst, K)
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    names = [name for name in header if name != "__metadata__"]
    data, place, moved = b"", 0, {"__metadata__": header["__metadata__"]}
    for name in reversed(names):
        first, last = header[name]["data_offsets"]
        data += raw[end + first : end + last]
        moved[name] = header[name] | {"data_offsets": [place, place := place + last - first]}
    text = json.dumps(moved).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    broken(src, dst, capsys, path.name, "order")


def test_metadata(pair, capsys) -> None:
    src, dst = pair
    path = shard_of(dst, K)
    rewrite(path, format="np")
    broken(src, dst, capsys, path.name, "metadata", "format")


@pytest.mark.parametrize(("key", "wrong"), [("num_key_value_heads", 4), ("rms_norm_eps", 0.5), ("spare", None)])
def test_config(pair, capsys, key, wrong) -> None:
    src, dst = pair
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps(config | {key: wrong}))
    broken(src, dst, capsys, "config.json", key)


def test_index(pair, capsys) -> None:
    src, dst = pair
    index = json.loads((dst / INDEX).read_text())
    index["metadata"]["total_size"] += 1
    index["weight_map"][K] = "elsewhere.safetensors"
    (dst / INDEX).write_text(json.dumps(index))
    broken(src, dst, capsys, INDEX, "total_size")
    broken(src, dst, capsys, INDEX, K)


@pytest.mark.parametrize("change", ["missing", "cut", "extra"])
def test_a_shard(pair, capsys, change) -> None:
    src, dst = pair
    path = shard_of(dst, K)
    if change == "missing":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path = Path(shutil.copy(path, dst / "model.safetensors"))
    broken(src, dst, capsys, path.name)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "config.json", INDEX])
def test_a_small_file(pair, capsys, name) -> None:
    src, dst = pair
    text = (dst / name).read_text()
    (dst / name).write_text(text + "\n")
    broken(src, dst, capsys, name)
    (dst / name).unlink()
    broken(src, dst, capsys, name)


def test_a_lone_state_dict(tmp_path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {f"{n}_proj.weight": rng.standard_normal((16, 16)) for n in ("q", "k", "v", "out")}
    np.savez(tmp_path / "model.npz", **tensors)
    convert_checkpoint(tmp_path / "model.npz", tmp_path / "dst", 2, num_heads=4, progress=False)
    assert verify_checkpoint(tmp_path / "model.npz", tmp_path / "dst", num_heads=4).faults == []
    flip(tmp_path / "dst", "v_proj.weight")
    faults = verify_checkpoint(tmp_path / "model.npz", tmp_path / "dst", num_heads=4).faults
    assert len(faults) == 1
    assert "v_proj.weight" in faults[0]


@pytest.mark.parametrize("output", ["native", "expanded"])
def test_logits_of_the_shipped_model(tmp_path, capsys, output) -> None:
    convert_checkpoint(llama.TINY, tmp_path / "dst", 2, output=output, progress=False)
    assert main(["verify", str(llama.TINY), str(tmp_path / "dst"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["logits"]["pooled_difference"] < 0.01 * found["logits"]["largest"] < found["logits"]["difference"]


def test_no_folder(tmp_path, capsys) -> None:
    assert main(["verify", str(llama.TINY), str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "none" in err
