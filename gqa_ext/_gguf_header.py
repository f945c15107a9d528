"""The header of a GGUF file: its metadata, and where each tensor lies.

A file is "GGUF", a version, the number of tensors and of metadata entries, the entries, the tensors' names,
shapes, types and offsets, and then, aligned, their bytes; all little-endian. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Nothing about the content is assumed: whatever breaks the format is a ValueError. No count is believed before
the bytes for it are there, so a header takes time and memory in proportion to its file. (The reader of the
`gguf` package reads past the end in silence and takes three seconds for a vocabulary of 50,000.)

Called by gqa_ext.gguf_files.
"""

import math
import os
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class Placed(NamedTuple):
    """A tensor as the header has it."""

    shape: tuple[int, ...]  # outermost dimension first, as NumPy has it; the file writes them the other way round
    kind: int  # ggml's number of its type
    offset: int  # of its first byte in the file


def read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Placed]]:
    """Metadata and tensors of an open file, in the file's order."""
    parser = _Parser(file)
    if parser.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF; is it a GGUF file?")
    version = parser.number("<u4")
    if version not in _VERSIONS:
        big = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{big}; versions 2 and 3, little-endian, are read")
    tensor_count, entry_count = parser.number("<u8"), parser.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        name = parser.string()
        try:
            metadata[name] = parser.value(parser.number("<u4"))
        except ValueError as error:
            raise ValueError(f"metadata {name!r:.80}: {error}") from None
    placed: dict[str, Placed] = {}
    for _ in range(tensor_count):
        name = parser.string()
        if name in placed:
            raise ValueError(f"tensor {name!r:.80} is there twice")
        try:
            placed[name] = parser.placed()
        except ValueError as error:
            raise ValueError(f"tensor {name!r:.80}: {error}") from None
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.80}; it is to be a power of two")
    start = -(-file.tell() // alignment) * alignment
    return metadata, {name: tensor._replace(offset=start + tensor.offset) for name, tensor in placed.items()}


class _Parser:
    """Takes values off a file, and never more than the file has."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ValueError(f"{size} bytes wanted, {self.left} are left; the file is cut short or broken")
        self.left -= size
        return self.file.read(size)

    def number(self, dtype: str) -> int:
        (number,) = np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype).tolist()
        return int(number)

    def string(self) -> str:
        (size,) = struct.unpack("<Q", self.take(8))
        return self.take(size).decode()  # UnicodeDecodeError is a ValueError

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, size = self.number("<u4"), self.number("<u8")
            return [self.string() for _ in range(size)] if kind == _STRING else self.scalars(kind, size)
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, size: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"type {kind} is unknown, or an array of arrays; wanted numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(size * dtype.itemsize), dtype).tolist()
        return values

    def placed(self) -> Placed:
        dims = self.number("<u4")
        if dims > _MAX_DIMS:
            raise ValueError(f"{dims} dimensions; {_MAX_DIMS} at most")
        shape = tuple(self.scalars(10, dims)[::-1])
        if math.prod(shape) >= 2**63:
            raise ValueError(f"shape {shape} has more elements than can be addressed")
        return Placed(shape, self.number("<u4"), self.number("<u8"))
