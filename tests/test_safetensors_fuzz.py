"""A corpus of broken files: each is a ValueError that names file and tensor, and nothing is written."""

import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_model

from gqa_ext.convert import convert_checkpoint

NAME = "model.layers.1.self_attn.v_proj.weight"
NESTED = "[" * 200_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "src")


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(sound: Path, tmp_path: Path, data: bytes) -> str:
    """What the converter says to this file, having written nothing."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir(exist_ok=True)
    (src / "config.json").write_bytes((sound / "config.json").read_bytes())
    (src / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors") as raised:
        convert_checkpoint(src, dst, 2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    return str(raised.value)


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown dtype": ({"dtype": "F128"}, "F128"),
    "dtype no text": ({"dtype": 7}, "dtype"),
    "negative size": ({"shape": [-32, -32]}, "shape"),
    "size no int": ({"shape": [32.0, 32]}, "shape"),
    "size true": ({"shape": [True, 1024]}, "shape"),
    "size text": ({"shape": "32"}, "shape"),
    "overflow": ({"shape": [1 << 62, 1 << 62]}, "overflow"),
    "overflow beside zero": ({"shape": [0, 1 << 62, 1 << 62]}, "overflow"),
    "huge size": ({"shape": [1 << 70]}, "shape"),
    "too many dimensions": ({"shape": [1] * 70}, "dimensions|sizes"),
    "bytes differ": ({"shape": [31, 32]}, "bytes"),
    "offsets reversed": ({"data_offsets": [4096, 0]}, "bytes"),
    "offsets negative": ({"data_offsets": [-4096, 0]}, "data_offsets"),
    "one offset": ({"data_offsets": [0]}, "data_offsets"),
    "three offsets": ({"data_offsets": [0, 4096, 4096]}, "data_offsets"),
    "out of file": ({"data_offsets": [1 << 40, (1 << 40) + 4096]}, "hole"),
    "over 64 bits": ({"data_offsets": [1 << 80, (1 << 80) + 4096]}, "data_offsets"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_broken_entry(sound, tmp_path, case) -> None:
    header, data = split((sound / "model.safetensors").read_bytes())
    change, match = ENTRIES[case]
    header[NAME] |= change
    message = refused(sound, tmp_path, join(header, data))
    assert NAME in message or case == "out of file"  # then it is the next that lies behind a hole
    assert any(word in message for word in match.split("|"))


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_lacking_entry(sound, tmp_path, key) -> None:
    header, data = split((sound / "model.safetensors").read_bytes())
    del header[NAME][key]
    assert NAME in refused(sound, tmp_path, join(header, data))


def test_overlaps_and_holes(sound, tmp_path) -> None:
    header, data = split((sound / "model.safetensors").read_bytes())
    start, stop = header[NAME]["data_offsets"]
    for shift in (-4, 4):
        moved = {NAME: {**header[NAME], "data_offsets": [start + shift, stop + shift]}}
        message = refused(sound, tmp_path, join(header | moved, data))
        assert "tensor" in message
    assert "tensors end" in refused(sound, tmp_path, join(header, data + b"\0"))
    assert "cut short" in refused(sound, tmp_path, join(header, data[:-1]))


WHOLE = {
    "empty": b"",
    "seven bytes": b"\x01\0\0\0\0\0\0",
    "length beyond": struct.pack("<Q", 1 << 63) + b"{}",
    "length over the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "length over the file": struct.pack("<Q", 3) + b"{}",
    "no text": join(b"\xff\xfe{}", b""),
    "no object": join(b"[]", b""),
    "a byte order mark": join(b"\xef\xbb\xbf{}", b""),
    "cut text": join(b'{"a":', b""),
    "nested": join(b'{"a":' + NESTED.encode(), b""),
    "NaN": join(b'{"a": NaN}', b""),
    "a number of many digits": join(b'{"a":' + b"9" * 10_000 + b"}", b""),
    "metadata no text": join({"__metadata__": {"a": 1}}, b""),
    "metadata a list": join({"__metadata__": []}, b""),
    "a lone surrogate": join(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    "a pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0",
    "a zip": b"PK\x03\x04" + b"\0" * 40,
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_broken_file(sound, tmp_path, case) -> None:
    refused(sound, tmp_path, WHOLE[case])


def test_a_name_that_is_there_twice(sound, tmp_path) -> None:
    header, data = split((sound / "model.safetensors").read_bytes())
    text = json.dumps(header).encode()
    twice = text[:-1] + b"," + json.dumps({NAME: header[NAME]}).encode()[1:]
    message = refused(sound, tmp_path, join(twice, data))
    assert "twice" in message
    assert NAME in message


def test_random_damage_is_refused_or_harmless(sound, tmp_path) -> None:
    """Bytes of the header are flipped, lost, doubled: an error of the right kind, or a sound file after all."""
    data, rng = (sound / "model.safetensors").read_bytes(), random.Random(5)
    size = 8 + struct.unpack("<Q", data[:8])[0]
    src = tmp_path / "src"
    src.mkdir()
    (src / "config.json").write_bytes((sound / "config.json").read_bytes())
    refusals = sound_after_all = 0
    for i in range(400):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(size)
            kind = rng.randrange(4)
            if kind == 0:
                broken[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del broken[place : place + rng.randrange(1, 9)]
            elif kind == 2:
                broken[place:place] = broken[place : place + rng.randrange(1, 9)]
            else:
                broken[place] = rng.choice(b'0123456789{}[]",:-e')
        (src / "model.safetensors").write_bytes(broken)
        try:
            convert_checkpoint(src, tmp_path / f"dst{i}", 2, progress=False)
        except ValueError as error:
            refusals += re.search(r"model\.safetensors|config\.json", str(error)) is not None
            continue
        sound_after_all += 1
    assert refusals + sound_after_all == 400
    assert refusals > 300
    assert len(list(tmp_path.iterdir())) == 1 + sound_after_all
