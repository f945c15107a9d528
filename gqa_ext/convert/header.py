"""The header of a safetensors file: proven sound before a byte behind it is used, and written.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The header gives
each tensor a dtype, a shape and its byte range, counted from the header's end; the ranges must cover the
data without hole or overlap. Format: https://huggingface.co/docs/safetensors.

Nothing about a file's content is assumed: whatever breaks the format is a ValueError that names file and
tensor. Called by safetensors.py for arrays, and by the converter, which copies byte ranges.
Where this reader is stricter than the `safetensors` library: names must be unique, the header must begin
with "{", and a shape must be one that NumPy can address.
"""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = [
    "DTYPES", "Header", "TensorInfo", "dtype_name", "format_header", "parse_header", "read_header", "reshape_header",
]  # fmt: skip

MAX_HEADER = 100_000_000  # bytes; the same limit as the safetensors library
MAX_DIMS = 64  # NumPy's
MAX_SIZE = 2**63 - 1  # bytes and elements, NumPy's intp

# name in the file: (bits an element, NumPy's type or None where NumPy has none: packed or exotic floats)
DTYPES: dict[str, tuple[int, np.dtype[Any] | None]] = {
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


_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The file's word for a dtype of NumPy, whatever its byte order."""
    found = _NAMES.get(dtype.newbyteorder("<"))
    if found is None:
        raise ValueError(f"dtype {dtype}; safetensors holds {', '.join(map(str, _NAMES))}")
    return found


def _bits(dtype: object) -> int:
    """Bits an element of a dtype takes in a file."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.80} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[dtype][0]


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


class Header(NamedTuple):
    """What stands before the data of a file.

    Attributes
    ----------
    text : bytes
        The length and the JSON as they lie in the file.
    tensors : dict of str to TensorInfo
        In the header's order, which need not be that of the data.
    metadata : dict of str to str
    """

    text: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def data_order(self) -> list[str]:
        """The names as their bytes lie in the file."""
        return sorted(self.tensors, key=lambda name: (self.tensors[name].start, self.tensors[name].stop))


def read_header(file: IO[bytes]) -> Header:
    """Read and check the header of an open file; the ValueError of a broken one names the tensor."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    text = file.read(_header_size(first, size))
    tensors, metadata = parse_header(text, size - 8 - len(text))
    return Header(first + text, tensors, metadata)


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


def format_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """The header of tensors that lie one behind the other, in the order given; their `start` is not used."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, info in tensors.items():
        if name == "__metadata__":
            raise ValueError("write(): tensor '__metadata__': the format keeps this name for the metadata; rename it")
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, start + info.nbytes]}
        start += info.nbytes
    return _pack(header, start)


def reshape_header(header: Header, shapes: Mapping[str, tuple[int, ...]], dropped: Collection[str] = ()) -> bytes:
    """The header of a file in which some tensors have another shape or are gone; order and metadata stay.

    Without a tensor that differs it is the same bytes.
    """
    if not dropped and all(header.tensors[name].shape == shape for name, shape in shapes.items()):
        return header.text
    entries, start = json.loads(header.text[8:]), 0
    for name in header.data_order:
        if name in dropped:
            del entries[name]
            continue
        info = header.tensors[name]
        info = TensorInfo(info.dtype, tuple(shapes.get(name, info.shape)), start)
        entries[name].update(shape=list(info.shape), data_offsets=[info.start, info.stop])
        start = info.stop
    return _pack(entries, start)


def _pack(header: Mapping[str, object], data_nbytes: int) -> bytes:
    """Length and JSON, padded with spaces so that the data starts at a multiple of 8."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    parse_header(text, data_nbytes)  # what is written can be read: names, metadata and shapes pass the same checks
    return struct.pack("<Q", len(text)) + text
