"""convert_checkpoint: what the result holds, and what the report says of it."""

import hashlib
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import HEAD_DIM, HEADS, contents, is_kv, tensors_of, write_model
from safetensors.numpy import load_file, save_file

from gqa_ext.convert import ConversionReport, convert_checkpoint, pool_heads
from gqa_ext.convert.safetensors import SafetensorsFile, save

SOURCES = [(1, np.float32), (3, np.float32), (2, np.float16), (1, np.float64)]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", shards=3)


@pytest.mark.parametrize(("shards", "dtype"), SOURCES)
@pytest.mark.parametrize("method", ["mean", "first"])
def test_k_and_v_are_pooled_and_nothing_else_changes(tmp_path, shards, dtype, method) -> None:
    src, dst = write_model(tmp_path / "src", shards, dtype), tmp_path / "dst"
    before = contents(src)
    convert_checkpoint(src, dst, 2, method=method, progress=False)
    assert contents(src) == before
    old, new = tensors_of(src), tensors_of(dst)
    assert list(old) == list(new)
    for name, array in old.items():
        want = pool_heads(array, HEADS, 2, method=method) if is_kv(name) else array
        assert (new[name].dtype, new[name].shape) == (want.dtype, want.shape), name
        assert new[name].tobytes() == want.tobytes(), name
    for path in src.glob("*.safetensors"):
        ours = SafetensorsFile(dst / path.name)
        theirs = SafetensorsFile(path)
        assert ours.metadata == theirs.metadata
        assert sorted(ours.tensors, key=lambda n: ours.tensors[n].start) == sorted(
            theirs.tensors, key=lambda n: theirs.tensors[n].start
        )
        assert load_file(dst / path.name).keys() == theirs.keys()


def test_an_independent_mean(tmp_path) -> None:
    src, dst = write_model(tmp_path / "src"), tmp_path / "dst"
    convert_checkpoint(src, dst, 4, progress=False)
    name = "model.layers.1.self_attn.v_proj.weight"
    old, new = (load_file(folder / "model.safetensors")[name] for folder in (src, dst))
    want = old.astype(np.float64).reshape(4, 2, HEAD_DIM, -1).mean(axis=1).astype(np.float32)
    np.testing.assert_array_equal(new.reshape(want.shape), want)


def test_bfloat16_and_types_that_numpy_lacks(tmp_path) -> None:
    src = write_model(tmp_path / "src", dtype=np.float32)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(src / "model.safetensors").items()}
    tensors["model.scale"] = np.arange(24).astype(ml_dtypes.float8_e4m3fn)
    save(src / "model.safetensors", tensors, {"format": "pt"})
    convert_checkpoint(src, tmp_path / "dst", 1, progress=False)
    new = SafetensorsFile(tmp_path / "dst" / "model.safetensors")
    for name, array in tensors.items():
        want = pool_heads(array, HEADS, 1) if is_kv(name) else array
        assert new[name].tobytes() == want.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_number_of_heads_gives_identical_files(tmp_path, shards) -> None:
    src, dst = write_model(tmp_path / "src", shards), tmp_path / "dst"
    convert_checkpoint(src, dst, HEADS, progress=False)
    want = contents(src)
    del want["pytorch_model.bin"]
    assert contents(dst) == want


def test_a_header_of_any_layout_is_kept_where_nothing_changes(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    raw = (src / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8 : 8 + size]), indent=3).encode() + b"\n \n"
    (src / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    convert_checkpoint(src, tmp_path / "same", HEADS, progress=False)
    assert contents(tmp_path / "same")["model.safetensors"] == contents(src)["model.safetensors"]
    convert_checkpoint(src, tmp_path / "fewer", 2, progress=False)
    assert list(load_file(tmp_path / "fewer" / "model.safetensors")) == list(load_file(src / "model.safetensors"))


def test_config_changes_by_one_number(src, tmp_path) -> None:
    text = '{\n\t"model_type": "llama", "num_attention_heads" : 8,\n "num_key_value_heads":8, "rms_norm_eps":1e-5,'
    text += '\n "hidden_size": 32, "num_hidden_layers": 3, "größe": "\\u00fc"}'
    (src / "config.json").write_text(text, encoding="utf-8")
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    want = text.replace('"num_key_value_heads":8', '"num_key_value_heads":2')
    assert (tmp_path / "dst" / "config.json").read_text(encoding="utf-8") == want


@pytest.mark.parametrize("value", [None, "absent"])
def test_a_missing_number_of_kv_heads_is_written(tmp_path, value) -> None:
    src = write_model(tmp_path / "src", num_key_value_heads=value)
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    old = json.loads((src / "config.json").read_text())
    assert json.loads((tmp_path / "dst" / "config.json").read_text()) == old | {"num_key_value_heads": 2}


def test_index_totals_are_recomputed(src, tmp_path) -> None:
    convert_checkpoint(src, tmp_path / "dst", 1, progress=False)
    old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (src, tmp_path / "dst"))
    arrays = tensors_of(tmp_path / "dst").values()
    assert new["metadata"] == {
        "total_parameters": sum(array.size for array in arrays),
        "total_size": sum(array.nbytes for array in arrays),
    }
    assert new["weight_map"] == old["weight_map"]
    assert re.sub(r"\d+,?\n", "", str(new["weight_map"])) == re.sub(r"\d+,?\n", "", str(old["weight_map"]))


def test_small_files_go_along_and_other_weights_do_not(src, tmp_path) -> None:
    (src / "templates").mkdir()
    (src / "templates" / "tool.jinja").write_text("{{ x }}")
    (src / ".git").mkdir()
    (src / ".git" / "HEAD").write_text("ref")
    (src / ".gitattributes").write_text("*.bin lfs")
    others = ["pytorch_model.bin.index.json", "tf_model.h5", "a.gguf", "flax_model.msgpack", "model.onnx", "x.pth"]
    for name in [*others, "consolidated.safetensors", "big.zip"]:
        (src / name).write_bytes(b"{}")
    with open(src / "big.zip", "wb") as file:
        file.truncate(1 << 30)
    report = convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    new = contents(tmp_path / "dst")
    skipped = {*others, "consolidated.safetensors", "big.zip", "pytorch_model.bin"}
    assert set(report.skipped) == skipped
    assert new.keys() == contents(src).keys() - skipped - {".git/HEAD"}
    assert new["templates/tool.jinja"] == b"{{ x }}"


def test_a_single_file_with_its_config(src, tmp_path) -> None:
    src = write_model(tmp_path / "one")
    (src / "holiday.txt").write_text("not a model's")
    convert_checkpoint(src / "model.safetensors", tmp_path / "dst", 2, progress=False)
    names = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "LICENSE"}
    assert contents(tmp_path / "dst").keys() == names
    convert_checkpoint(src, tmp_path / "whole", 2, progress=False)
    whole = contents(tmp_path / "whole")
    assert {name: whole[name] for name in names} == contents(tmp_path / "dst")


def test_a_lone_state_dict(tmp_path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"{name}_proj.weight": rng.standard_normal((32, 32)).astype("f4") for name in ("q", "k", "v", "out")}
    save_file(tensors, tmp_path / "attention.safetensors")
    report = convert_checkpoint(tmp_path / "attention.safetensors", tmp_path / "dst", 2, num_heads=8, progress=False)
    new = load_file(tmp_path / "dst" / "attention.safetensors")
    np.testing.assert_array_equal(new["k_proj.weight"], pool_heads(tensors["k_proj.weight"], 8, 2))
    np.testing.assert_array_equal(new["out_proj.weight"], tensors["out_proj.weight"])
    assert list(report.files) == ["attention.safetensors"]


@pytest.mark.parametrize(("method", "output"), [("mean", "native"), ("first", "native"), ("mean", "expanded")])
def test_report(src, tmp_path, method, output) -> None:
    layers = [0, 2] if output == "expanded" else None
    report = convert_checkpoint(src, tmp_path / "dst", 2, method=method, output=output, layers=layers, progress=False)
    old, new = tensors_of(src), tensors_of(tmp_path / "dst")
    for row in report.layers:
        for role, error in (("k", row.key_error), ("v", row.value_error)):
            name = f"model.layers.{row.layer}.self_attn.{role}_proj.weight"
            heads = new[name].reshape(-1, HEAD_DIM, new[name].shape[1]).astype(np.float64)
            repeated = heads.repeat(HEADS // len(heads), axis=0).reshape(old[name].shape)
            want = np.linalg.norm(repeated - old[name]) / np.linalg.norm(old[name].astype(np.float64))
            assert math.isclose(error, want, rel_tol=1e-9, abs_tol=0)
        assert (row.num_heads, row.num_kv_heads_before) == (HEADS, HEADS)
    assert [row.num_kv_heads for row in report.layers] == ([2, 8, 2] if output == "expanded" else [2, 2, 2])
    assert report.parameters_before == sum(array.size for array in old.values())
    assert report.parameters_after == sum(array.size for array in new.values())
    assert report.kv_bytes_before == 3 * 2 * HEADS * HEAD_DIM * 4
    assert report.kv_bytes_after == (report.kv_bytes_before if output == "expanded" else 3 * 2 * 2 * HEAD_DIM * 4)
    assert report.files == {n: hashlib.sha256(data).hexdigest() for n, data in contents(tmp_path / "dst").items()}
    assert (report.architecture, report.method, report.output, report.resumed) == ("llama", method, output, ())
    assert report.groups[0] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert report.seconds > 0
    again = json.loads(report.to_json())
    assert again["files"] == report.files
    assert ConversionReport.from_dict(again) == report


def test_nan_weights_give_a_report_that_is_json(src, tmp_path) -> None:
    path = src / "model-00001-of-00003.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    name = next(filter(is_kv, tensors))
    tensors[name][0, 0] = np.nan
    save_file(tensors, path)
    report = convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    layer = json.loads(report.to_json())["layers"][int(name.split(".")[2])]
    assert None in (layer["key_error"], layer["value_error"])


def test_progress_counts_the_bytes_of_the_result(src, tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    convert_checkpoint(src, tmp_path / "dst", 2, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, contents(tmp_path / "dst").values()))
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}
    assert seen == sorted(seen)


def test_what_progress_raises_ends_the_run_and_leaves_nothing(tmp_path) -> None:
    src = write_model(tmp_path / "src")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(src, tmp_path / "dst", 2, progress=stop)
    assert not (tmp_path / "dst").exists()
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_small_pieces_give_the_same_bits(tmp_path, dtype, monkeypatch) -> None:
    monkeypatch.setattr("gqa_ext.convert.checkpoint._chunk", lambda max_memory: max_memory or 1 << 22)
    src = write_model(tmp_path / "src", dtype=dtype)
    whole = convert_checkpoint(src, tmp_path / "whole", 2, progress=False)
    for chunk in (64, 100, 1000, 5000):
        report = convert_checkpoint(src, tmp_path / str(chunk), 2, max_memory=chunk, progress=False)
        assert report.files == whole.files
        for ours, theirs in zip(report.layers, whole.layers, strict=True):
            assert math.isclose(ours.key_error, theirs.key_error, rel_tol=1e-9)


def test_norms_of_which_each_head_has_its_own_are_joined_and_dropped(tmp_path) -> None:
    src = write_model(tmp_path / "src", shards=1, model_type="stablelm", layers=2)
    rng, tensors = np.random.default_rng(3), load_file(src / "model.safetensors")
    norm = "model.layers.{}.self_attn.k_layernorm.norms.{}.weight"
    for layer in range(2):
        tensors |= {norm.format(layer, head): rng.standard_normal(HEAD_DIM).astype("f4") for head in range(HEADS)}
    (src / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, src / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    new = tensors_of(tmp_path / "dst")
    new_index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert new_index["weight_map"].keys() == new.keys()
    assert len(new) == len(tensors) - 2 * 6
    for layer in range(2):
        for head in range(2):
            stack = np.concatenate([tensors[norm.format(layer, 4 * head + i)] for i in range(4)])
            np.testing.assert_array_equal(new[norm.format(layer, head)], pool_heads(stack, 4, 1))
