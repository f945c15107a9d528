"""inspect_checkpoint and `gqa-ext inspect`: what any file holds, and the cache of known architectures."""

import json

import numpy as np
import pytest
from checkpoints import llama, write_config, write_model
from safetensors.numpy import save_file

from gqa_ext.__main__ import main
from gqa_ext.convert.inspect import inspect_checkpoint


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["inspect", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_known_architecture(tmp_path, capsys, shards) -> None:
    src = write_model(tmp_path / "src", shards, np.float16)
    found = inspected(capsys, src)
    attention = found["attention"]
    assert (attention["architecture"], attention["layers"], set(attention["num_heads"])) == ("llama", 3, {8})
    assert attention["kv_bytes_per_token"] == 3 * 8 * (4 + 4) * 2
    assert attention["kv_bytes_per_token_at"] == {str(n): 3 * n * (4 + 4) * 2 for n in (8, 4, 2, 1)}
    tensors = llama(3, np.float16)
    assert {name: tuple(info["shape"]) for name, info in found["tensors"].items()} == {
        name: array.shape for name, array in tensors.items()
    }
    assert found["dtypes"] == {"F16": sum(array.nbytes for array in tensors.values())}
    assert main(["inspect", str(src)]) == 0
    text = capsys.readouterr().out
    for wanted in ("architecture: llama", "heads: 8", "layers: 3", "F16", "KV bytes per token: 384", *tensors):
        assert wanted in text


def test_grouped_is_no_obstacle(tmp_path) -> None:
    src = write_model(tmp_path / "src")
    tensors = {name: array[:8] if "k_proj" in name or "v_proj" in name else array for name, array in llama().items()}
    save_file(tensors, src / "model.safetensors")
    write_config(src, num_key_value_heads=2)
    attention = inspect_checkpoint(src)["attention"]
    assert attention["num_kv_heads"] == [2, 2, 2]
    assert list(attention["kv_bytes_per_token_at"]) == ["2", "1"]


def test_an_unknown_architecture_and_files_without_config(tmp_path, capsys) -> None:
    src = write_model(tmp_path / "src", model_type="martian")
    found = inspected(capsys, src)
    assert found["attention"] is None
    assert "martian" in found["reason"]
    assert len(found["tensors"]) == 17
    (src / "config.json").unlink()
    for path in (src, src / "model.safetensors"):
        found = inspected(capsys, path)
        assert found["files"] == {"model.safetensors": {"metadata": {"format": "pt"}}}
        assert len(found["tensors"]) == 17


def test_an_npz_file(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{name}_proj": rng.standard_normal((16, 16)) for name in "qkvo"}
    np.savez(tmp_path / "model.npz", **arrays)
    found = inspected(capsys, tmp_path / "model.npz", "--num-heads", 4)
    assert found["dtypes"] == {"F64": 4 * 16 * 16 * 8}
    assert found["attention"]["kv_bytes_per_token"] == 2 * 16 * 8


def test_what_cannot_be_read(tmp_path, capsys) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{bad}")
    (tmp_path / "empty").mkdir()
    for name in ("a.safetensors", "none", "empty"):
        assert main(["inspect", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert name in err
