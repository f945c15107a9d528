"""Safetensors files: proven sound before a byte is used, read by mmap, written whole or not at all.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The header gives
each tensor a dtype, a shape and its byte range, counted from the header's end; the ranges must cover the
data without hole or overlap. Format: https://huggingface.co/docs/safetensors.

Nothing about a file's content is assumed: whatever breaks the format is a ValueError that names file and
tensor. It is assumed that nobody shortens a file while it is mapped; the operating system answers that
with SIGBUS, in every reader that maps files.

Called by gqa_ext.llama_files. Where this reader is stricter than the `safetensors` library: names must be unique,
the header must begin with "{", and a shape must be one that NumPy can address.
"""

import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["SafetensorsFile", "TensorInfo", "parse_header", "save", "write"]

MAX_HEADER = 100_000_000  # bytes; the same limit as the safetensors library
MAX_DIMS = 64  # NumPy's
MAX_SIZE = 2**63 - 1  # bytes and elements, NumPy's intp

# name in the file: (bits an element, NumPy's type or None where NumPy has none: packed or exotic floats)
_DTYPES: dict[str, tuple[int, np.dtype[Any] | None]] = {
    "BOOL": (8, np.dtype(bool)),
    "U8": (8, np.dtype("u1")),
    "I8": (8, np.dtype("i1")),
    "U16": (16, np.dtype("<u2")),
    "I16": (16, np.dtype("<i2")),
    "U32": (32, np.dtype("<u4")),
    "I32": (32, np.dtype("<i4")),
    "U64": (64, np.dtype("<u8")),
    "I64": (64, np.dtype("<i8")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "F32": (32, np.dtype("<f4")),
    "F64": (64, np.dtype("<f8")),
    "C64": (64, np.dtype("<c8")),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E4M3FNUZ": (8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    "F8_E5M2FNUZ": (8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    "F8_E8M0": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items() if dtype is not None}


def _bits(dtype: object) -> int:
    """Bits an element of a dtype takes in a file."""
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r:.80} is unknown; known are {', '.join(_DTYPES)}")
    return _DTYPES[dtype][0]


class TensorInfo(NamedTuple):
    """One tensor of a header.

    Attributes
    ----------
    dtype : str
        The file's word for it, as "BF16".
    shape : tuple of int
    start : int
        First byte, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; the format lets no tensor end inside a byte."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + self.nbytes


class SafetensorsFile(Mapping[str, NDArray[Any]]):
    """A safetensors file as a read-only mapping from tensor name to array, in the file's order.

    Arrays are views of the mapped file: nothing is read before it is touched, and the file stays mapped
    until the last array is gone.

    Parameters
    ----------
    path : str or path-like

    Attributes
    ----------
    path : pathlib.Path
    tensors : dict of str to TensorInfo
        In the header's order.
    metadata : dict of str to str

    Raises
    ------
    OSError
        The file cannot be opened.
    ValueError
        The file breaks the format; the message names the file and, where it is one tensor, the tensor.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
    >>> save(path, {"weight": np.ones((2, 3), np.float32)})
    >>> file = SafetensorsFile(path)
    >>> file["weight"].shape, file.tensors["weight"].dtype
    ((2, 3), 'F32')
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                header_size = _header_size(file.read(8), size)
                self._data_start = 8 + header_size
                self.tensors, self.metadata = parse_header(file.read(header_size), size - self._data_start)
            except ValueError as error:
                raise ValueError(f"SafetensorsFile(): {self.path}: {error}") from None
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file, shape (nbytes,), for any dtype."""
        info = self.tensors[name]
        return self._bytes[self._data_start + info.start : self._data_start + info.stop]

    def __getitem__(self, name: str) -> NDArray[Any]:
        info = self.tensors[name]
        dtype = _DTYPES[info.dtype][1]
        if dtype is None:
            raise TypeError(
                f"SafetensorsFile[{name!r}]: {self.path}: the tensor's dtype {info.dtype} has no NumPy type; "
                f"use .raw({name!r}), which gives its bytes"
            )
        return self.raw(name).view(dtype).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r})"


def _header_size(first: bytes, file_size: int) -> int:
    """Length of the header of a file of `file_size` bytes that begins with the 8 bytes `first`."""
    if len(first) < 8:
        raise ValueError(f"the file has {file_size} bytes, a safetensors file at least 8; fetch or write it again")
    (size,) = struct.unpack("<Q", first)
    if size > MAX_HEADER:
        raise ValueError(f"the header claims {size} bytes, at most {MAX_HEADER} are allowed; is it a safetensors file?")
    if size > file_size - 8:
        raise ValueError(f"the header claims {size} bytes but {file_size - 8} follow; the file is cut short")
    return int(size)


def parse_header(text: bytes, data_nbytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check a header against the format and against the size of the data behind it.

    Parameters
    ----------
    text : bytes
        The JSON header, with its padding.
    data_nbytes : int
        Bytes that follow the header in the file.

    Returns
    -------
    tensors : dict of str to TensorInfo
        In the header's order.
    metadata : dict of str to str

    Raises
    ------
    ValueError
        The header is not UTF-8 JSON, repeats a name, lacks or mistypes an entry, names an unknown dtype, or
        its byte ranges disagree with the shapes, overlap, leave a hole or leave the file.
    """
    header = _parse_json(text)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(_is_text(item) for pair in metadata.items() for item in pair):
        raise ValueError(f"__metadata__ must map strings to strings, not {metadata!r:.80}")
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _parse_tensor(name, entry)
        except ValueError as error:
            raise ValueError(f"tensor {name!r:.200}: {error}") from None
    _check_cover(tensors, data_nbytes)
    return tensors, metadata


def _parse_json(text: bytes) -> dict[str, Any]:
    if text[:1] != b"{":
        raise ValueError(f"the header begins with {text[:1]!r}, not with '{{'; is it a safetensors file?")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not sound UTF-8 JSON: {error}") from None
    assert isinstance(header, dict)  # it began with "{"
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r:.200} is there twice")
        result[name] = value
    return result


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _is_text(item: object) -> bool:
    """A string without lone surrogates, which JSON can escape but UTF-8 cannot hold."""
    return isinstance(item, str) and not any("\ud800" <= letter <= "\udfff" for letter in item)


def _is_sizes(item: object) -> bool:
    """A list of integers a file may use as sizes (JSON's true is an int to Python)."""
    return isinstance(item, list) and all(type(size) is int and 0 <= size <= MAX_SIZE for size in item)


def _parse_tensor(name: str, entry: object) -> TensorInfo:
    """One header entry, proven sound by itself."""
    if not _is_text(name):
        raise ValueError("the name is no valid Unicode")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"needs dtype, shape and data_offsets, has {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _bits(dtype)
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"shape {shape!r:.80} is not a list of at most {MAX_DIMS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {offsets!r:.80} are not [start, stop]")
    # NumPy multiplies the sizes that are not 0 even when another is
    if math.prod(size for size in shape if size) * bits > 8 * MAX_SIZE:
        raise ValueError(f"shape {shape!r:.80} of {dtype} overflows 64 bits")
    start, stop = offsets
    if math.prod(shape) * bits != 8 * (stop - start):
        raise ValueError(
            f"shape {shape} of {dtype} takes {math.prod(shape) * bits / 8:.16g} bytes, "
            f"but data_offsets {offsets} give {stop - start}"
        )
    return TensorInfo(dtype, tuple(shape), start)


def _check_cover(tensors: Mapping[str, TensorInfo], data_nbytes: int) -> None:
    """The byte ranges, in order, cover the data exactly."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.stop > data_nbytes:
            raise ValueError(f"tensor {name!r:.200}: ends at byte {info.stop} of {data_nbytes}; the file is cut short")
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {name!r:.200}: starts at byte {info.start}, wanted {end}; it {kind}")
        end = info.stop
    if end != data_nbytes:
        raise ValueError(f"the tensors end at byte {end} but the file has {data_nbytes} bytes of data")


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, which appears under its name only when it is complete.

    Tensors are stored widest element type first, otherwise in the order given, so that each lies aligned.

    Parameters
    ----------
    path : str or path-like
        Replaced if it is there; arrays mapped from the old file stay valid.
    tensors : mapping of str to array
        Any strides and byte order.
    metadata : mapping of str to str, optional

    Raises
    ------
    TypeError
        An array's dtype has no name in the format.
    ValueError
        A name or the metadata breaks the format.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    infos = {name: TensorInfo(_dtype_name(name, arrays[name]), arrays[name].shape) for name in names}
    write(path, infos, (_little_endian_bytes(arrays[name]) for name in names), metadata)


def _dtype_name(name: str, array: NDArray[Any]) -> str:
    found = _NAMES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise TypeError(
            f"save(): tensor {name!r} has dtype {array.dtype}; safetensors holds {', '.join(map(str, _NAMES))}; "
            "convert it with .astype()"
        )
    return found


def _little_endian_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.reshape(-1).view(np.uint8)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorInfo],
    buffers: Iterable[bytes | NDArray[np.uint8]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors given as bytes, in the order given and one at a time; any dtype of the format passes.

    Parameters
    ----------
    path : str or path-like
        Appears when it is complete and on disk; replaced if it is there.
    tensors : mapping of str to TensorInfo
        Their `start` is not used: tensors lie one behind the other.
    buffers : iterable of bytes or array of uint8
        Each tensor's bytes, little-endian; taken one by one, so a generator keeps one in memory.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        The header would break the format, or a buffer has not its tensor's size.
    """
    path = Path(path)
    header = _format_header(tensors, metadata)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")  # on the same file system
    try:
        with open(partial, "xb") as file:
            file.write(header)
            for (name, info), buffer in zip(tensors.items(), buffers, strict=True):
                if file.write(buffer if isinstance(buffer, bytes) else buffer.data) != info.nbytes:
                    raise ValueError(f"write(): tensor {name!r}: {len(buffer)} bytes given, {info} takes {info.nbytes}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _format_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON header, padded with spaces so that the data starts at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, info in tensors.items():
        if name == "__metadata__":
            raise ValueError("write(): tensor '__metadata__': the format keeps this name for the metadata; rename it")
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, start + info.nbytes]}
        start += info.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    parse_header(text, start)  # what is written can be read: names, metadata and shapes pass the same checks
    return struct.pack("<Q", len(text)) + text
