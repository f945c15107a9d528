"""gqa_ext.convert.safetensors: the safetensors library as twin, every dtype, and headers that lie."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_ext.convert.safetensors import SafetensorsFile, TensorInfo, parse_header, save, write

NUMPY_TYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
ML_TYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
RAW_TYPES = {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
DTYPES = [np.dtype(name) for name in NUMPY_TYPES] + [np.dtype(getattr(ml_dtypes, name)) for name in ML_TYPES]


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes read as dtype: NaNs, infinities and subnormals included."""
    count = int(np.prod(shape))
    random = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, np.uint8)
    return (random & 1 if dtype.kind == "b" else random).view(dtype).reshape(shape)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def build(header: object, data: bytes = b"") -> bytes:
    """A file from a header given as JSON value or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_round_trip(path, dtype, shape):
    array = random_array(dtype, shape)
    save(path, {"x": array, "other": np.zeros(3, bool)}, {"format": "np"})
    file = SafetensorsFile(path)
    assert same_bytes(file["x"], array)
    assert file.metadata == {"format": "np"}
    assert not file["x"].flags.writeable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_library_reads_ours_and_we_read_its(path, dtype):
    torch = pytest.importorskip("torch")
    twin = pytest.importorskip("safetensors.torch")
    array = random_array(dtype, (3, 4))
    bits = torch.from_numpy(array.view(np.uint8).copy())
    torch_dtype = getattr(torch, dtype.name)
    twin.save_file({"x": bits.view(torch_dtype)}, path, {"a": "b"})
    file = SafetensorsFile(path)
    assert same_bytes(file["x"], array)
    assert file.metadata == {"a": "b"}
    save(path, {"x": array})
    ours = twin.load_file(path)["x"]
    assert (ours.dtype, ours.shape) == (torch_dtype, (3, 4))
    assert torch.equal(ours.view(torch.uint8), bits)


def test_torch_reads_mixed_dtypes(path):
    torch_twin = pytest.importorskip("safetensors.torch")
    arrays = {"flag": np.array([True]), "w": np.arange(3, dtype="f4"), "h": np.ones(5, ml_dtypes.bfloat16)}
    save(path, arrays)
    tensors = torch_twin.load_file(path)
    assert list(SafetensorsFile(path)) == ["w", "h", "flag"]  # widest first, so that each lies aligned
    for name, array in arrays.items():
        assert np.array_equal(tensors[name].float().numpy(), array.astype("f4"))


@pytest.mark.parametrize("dtype", RAW_TYPES)
def test_types_numpy_lacks_pass_through(path, dtype):
    data = bytes(range(8 * RAW_TYPES[dtype] // 8))
    write(path, {"x": TensorInfo(dtype, (2, 4))}, [data])
    file = SafetensorsFile(path)
    assert file.raw("x").tobytes() == data
    assert file.tensors["x"] == TensorInfo(dtype, (2, 4), 0)
    with pytest.raises(TypeError, match=rf"{dtype} has no NumPy type; use \.raw\('x'\)"):
        file["x"]
    copy = path.with_name("copy.safetensors")
    write(copy, file.tensors, (file.raw(name) for name in file), file.metadata)
    assert copy.read_bytes() == path.read_bytes()


def test_any_strides_and_byte_order(path):
    array = np.arange(24, dtype=">f4").reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    save(path, {"x": array})
    assert np.array_equal(SafetensorsFile(path)["x"], array)


def test_odd_header_length_and_leading_metadata(path):
    text = b'{"__metadata__":null,"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\n'
    path.write_bytes(build(text, struct.pack("<2f", 1.5, -2)))
    assert SafetensorsFile(path)["x"].tolist() == [1.5, -2]


def test_names_are_any_text(path):
    arrays = {name: np.zeros(1) for name in ["", "ключ", 'a"b\\', "x" * 1000]}
    save(path, arrays)
    assert set(SafetensorsFile(path)) == set(arrays)


def test_empty_file(path):
    save(path, {})
    assert dict(SafetensorsFile(path)) == {}
    assert len(path.read_bytes()) % 8 == 0


def test_arrays_outlive_the_file_and_its_replacement(path):
    save(path, {"x": np.full(1000, 7, "i4")})
    array = SafetensorsFile(path)["x"]
    save(path, {"x": array + 1})
    path.unlink()
    assert (array == 7).all()


BROKEN = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "header past the end": (struct.pack("<Q", 50) + b"{}", "cut short"),
    "header 2**63": (struct.pack("<Q", 2**63) + b"{}", "at most"),
    "header over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "at most"),
    "no header": (build(b""), "begins with"),
    "a list": (build(b"[]"), "begins with"),
    "leading space": (build(b" {}"), "begins with"),
    "not JSON": (build(b"{nope}"), "JSON"),
    "NUL padding": (build(b"{}\0\0"), "JSON"),
    "two values": (build(b"{}{}"), "JSON"),
    "not UTF-8": (build(b'{"\xff":1}'), "UTF-8"),
    "NaN": (build(b'{"a":NaN}'), "NaN"),
    "deep": (build(b'{"a":' + b"[" * 200_000), "JSON"),
    "huge number": (build(b'{"a":' + b"9" * 10_000 + b"}"), "JSON"),
    "lone surrogate": (build(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "Unicode"),
    "name twice": (build(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "'a' is there twice"),
    "field twice": (build(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "'dtype' is there"),
    "metadata list": (build({"__metadata__": []}), "__metadata__"),
    "metadata number": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry a list": (build({"a": ["U8", [2], [0, 2]]}, b"12"), "tensor 'a'.*needs"),
    "no shape": (build({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"12"), "tensor 'a'.*needs"),
    "unknown dtype": (build({"a": entry("Q8")}, b"12"), "tensor 'a'.*'Q8' is unknown"),
    "lower case": (build({"a": entry("u8")}, b"12"), "tensor 'a'.*unknown"),
    "dtype a list": (build({"a": entry(["U8"])}, b"12"), "tensor 'a'.*unknown"),
    "shape a number": (build({"a": entry(shape=2)}, b"12"), "tensor 'a'.*sizes"),
    "shape float": (build({"a": entry(shape=[2.0])}, b"12"), "tensor 'a'.*sizes"),
    "shape true": (build({"a": entry(shape=[True, 2])}, b"12"), "tensor 'a'.*sizes"),
    "shape negative": (build({"a": entry(shape=[-1, -2])}, b"12"), "tensor 'a'.*sizes"),
    "65 dimensions": (build({"a": entry(shape=[1] * 64 + [2])}, b"12"), "tensor 'a'.*sizes"),
    "overflow": (build({"a": entry("F32", [2**31, 2**31, 2], [0, 0])}), "tensor 'a'.*overflow"),
    "overflow to zero": (build({"a": entry("U8", [0, 2**40, 2**40], [0, 0])}), "tensor 'a'.*overflow"),
    "size past 64 bits": (build({"a": entry("U8", [2**64], [0, 0])}), "tensor 'a'.*sizes"),
    "one offset": (build({"a": entry(offsets=[0])}, b"12"), "tensor 'a'.*data_offsets"),
    "offsets backwards": (build({"a": entry(offsets=[2, 0])}, b"12"), "tensor 'a'.*takes 2"),
    "negative offset": (build({"a": entry(offsets=[-2, 0])}, b"12"), "tensor 'a'.*data_offsets"),
    "wrong size": (build({"a": entry("F32", [2], [0, 2])}, b"12"), "tensor 'a'.*takes 8 bytes.*give 2"),
    "half a byte": (build({"a": entry("F4", [3], [0, 1])}, b"1"), "tensor 'a'.*takes 1.5 bytes"),
    "out of the file": (build({"a": entry()}, b"1"), "tensor 'a'.*cut short"),
    "overlap": (build({"a": entry(), "b": entry(offsets=[1, 3])}, b"123"), "tensor 'b'.*overlap"),
    "the same bytes twice": (build({"a": entry(), "b": entry()}, b"12"), "tensor 'b'.*overlap"),
    "empty tensor inside": (build({"a": entry(), "b": entry(shape=[0], offsets=[1, 1])}, b"12"), "tensor 'b'.*overlap"),
    "hole": (build({"a": entry(), "b": entry(offsets=[3, 5])}, b"12345"), "tensor 'b'.*hole"),
    "hole at the start": (build({"a": entry(offsets=[1, 3])}, b"123"), "tensor 'a'.*hole"),
    "data behind": (build({"a": entry()}, b"123"), "end at byte 2 but the file has 3"),
    "data without tensors": (build({}, b"x"), "end at byte 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_by_name(path, case):
    content, message = BROKEN[case]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){path.name}.*{message}"):
        SafetensorsFile(path)


STRICTER = {"leading space", "name twice", "lone surrogate", "overflow to zero", "entry a list", "65 dimensions"}


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - STRICTER))
def test_the_library_refuses_the_same_files(case):
    library = pytest.importorskip("safetensors")
    with pytest.raises(library.SafetensorError):
        library.deserialize(BROKEN[case][0])


GOOD = json.dumps({"a": entry("F32", [2], [0, 8]), "b": entry("U8", [3], [8, 11])}).encode()


@given(st.binary(max_size=6), st.integers(0, len(GOOD)), st.integers(0, 6))
def test_a_damaged_header_is_sound_or_refused(patch, at, cut):
    text = GOOD[:at] + patch + GOOD[at + cut :]
    try:
        tensors, _ = parse_header(text, 11)
    except ValueError:
        return
    assert sum(info.nbytes for info in tensors.values()) == 11


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"x": np.zeros(2, "c16")}, TypeError, "'x' has dtype complex128"),
        ({"x": np.array(["a"])}, TypeError, "'x' has dtype"),
        ({"__metadata__": np.zeros(2)}, ValueError, "__metadata__"),
        ({"\ud800": np.zeros(2)}, ValueError, "surrogates"),
    ],
)
def test_save_refuses(path, tensors, error, message):
    with pytest.raises(error, match=message):
        save(path, tensors)
    assert list(path.parent.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(path):
    save(path, {"x": np.zeros(2)})
    before = path.read_bytes()
    for dtype, buffers, message in [
        ("U8", [b"12"], "'x': 2 bytes given"),
        ("U8", [], "shorter"),
        ("U8", [b"123", b"4"], "longer"),
        ("Q8", [b"123"], "'Q8' is unknown"),
        ("F4", [b"1"], "1.5 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(path, {"x": TensorInfo(dtype, (3,))}, buffers)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
