"""An .npz file as a source: where each array's bytes lie in it.

`numpy.savez` stores arrays as they are, so they are byte ranges of the file, as in safetensors. What it would take
code or memory to read is refused: pickled objects, compressed arrays. Called by source.py.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from .header import Header, TensorInfo, dtype_name, format_header

__all__ = ["read_npz"]

_LOCAL = struct.Struct("<26xHH")  # the part of a zip's local header that says how long its name and extra field are
_MAX_NPY_HEADER = 10_000


def read_npz(path: Path) -> Header:
    """The arrays of a file; `start` counts from the file's first byte and `text` heads the safetensors they become."""
    tensors = {}
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
                name = member.filename.removesuffix(".npy")
                try:
                    info = _array(file, member)
                    if info.stop > size:
                        raise ValueError("it ends behind the file, which is cut short")
                    if name in tensors:
                        raise ValueError("it is there twice")
                except ValueError as error:
                    raise ValueError(f"tensor {name!r:.200}: {error}") from None
                tensors[name] = info
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(f"it is no sound .npz file ({error})") from None
    return Header(format_header(tensors, None), tensors, {})


def _array(file: IO[bytes], member: zipfile.ZipInfo) -> TensorInfo:
    """Where an array lies, from the zip's and NumPy's headers."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError("it is compressed or encrypted; write the file with numpy.savez, not savez_compressed")
    file.seek(member.header_offset)
    local = file.read(_LOCAL.size)
    if len(local) < _LOCAL.size:
        raise ValueError("its header is cut short")
    file.seek(sum(_LOCAL.unpack(local)), os.SEEK_CUR)
    shape, fortran, dtype = _npy_header(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which can run any code; save arrays of numbers")
    if (fortran and len(shape) > 1) or dtype.newbyteorder("<") != dtype:
        raise ValueError("it is in Fortran's or big-endian order; save numpy.ascontiguousarray(x.astype('<f4'))")
    return TensorInfo(dtype_name(dtype), tuple(map(int, shape)), file.tell())


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype, by NumPy's own reader."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is .npy {version}; 1.0 or 2.0 was wanted")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:  # the reader evaluates Python literals, and their errors are many
        raise ValueError(f"its .npy header is broken ({error!r:.80})") from None
