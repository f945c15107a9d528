"""Safetensors files as arrays: read by mmap, written whole or not at all.

header.py proves a file sound before an array of it is made. It is assumed that nobody shortens a file
while it is mapped; the operating system answers that with SIGBUS, in every reader that maps files.
Called by gqa_ext.llama_files; the converter itself maps nothing and copies byte ranges (tasks.py).
"""

import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .header import DTYPES, TensorInfo, dtype_name, format_header, parse_header, read_header

__all__ = ["SafetensorsFile", "TensorInfo", "parse_header", "save", "write"]



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
            try:
                header = read_header(file)
            except ValueError as error:
                raise ValueError(f"SafetensorsFile(): {self.path}: {error}") from None
            self.tensors, self.metadata, self._data_start = header.tensors, header.metadata, len(header.text)
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file, shape (nbytes,), for any dtype."""
        info = self.tensors[name]
        return self._bytes[self._data_start + info.start : self._data_start + info.stop]

    def __getitem__(self, name: str) -> NDArray[Any]:
        info = self.tensors[name]
        dtype = DTYPES[info.dtype][1]
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
    try:
        return dtype_name(array.dtype)
    except ValueError as error:
        raise TypeError(f"save(): tensor {name!r} has {error}; convert it with .astype()") from None


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
    header = format_header(tensors, metadata)
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
