"""What a file of the result is made of: bytes given, bytes of the source, and slots pooled from the source.

A file is a sequence of parts; each says how many bytes it gives and gives them in pieces that fit a buffer,
reading the source by pread, so that memory is bounded whatever a tensor's size and a source that shrinks is
an error, not a signal. Called by tasks.py.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .header import DTYPES, TensorInfo
from .slots import SlotMean

__all__ = ["Copy", "Given", "Join", "Part", "Pool", "StandIn", "Sums", "read_exactly"]

Sums = dict[str, tuple[float, float]]  # label: squared distance between heads and what replaced them, squared norm
_BLOCK = 1 << 15  # elements measured at a time: float64 copies of two rows stay in L2


@dataclass(frozen=True)
class Given:
    """Bytes that the task carries: headers, config, index."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return len(self.data)

    def pieces(self, limit: int) -> Iterator["Piece"]:
        """The work in stretches of at most `limit` bytes."""
        for start in range(0, self.nbytes, limit):
            yield _GivenPiece(self.data[start : start + limit])


@dataclass(frozen=True)
class Copy:
    """Bytes of the source file, counted from its start."""

    start: int
    nbytes: int

    def pieces(self, limit: int) -> Iterator["Piece"]:
        """The work in stretches of at most `limit` bytes."""
        for done in range(0, self.nbytes, limit):
            yield _CopyPiece(self.start + done, min(limit, self.nbytes - done))


class StandIn(NamedTuple):
    """Slot `slot` of the result is read where slot `source` was, by so many `heads`; `label` says in whose error."""

    label: str
    slot: int
    source: int
    heads: int


@dataclass(frozen=True)
class Pool:
    """A tensor whose slots are means of the source's.

    Attributes
    ----------
    info : TensorInfo
        Of the source; `start` counts from the start of the file.
    mean : SlotMean
    stand_ins : tuple of StandIn
        Whose loss is measured on the way.
    """

    info: TensorInfo
    mean: SlotMean
    stand_ins: tuple[StandIn, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.mean.shape(self.info.shape)) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """One of the four that are pooled."""
        dtype = DTYPES[self.info.dtype][1]
        assert dtype is not None  # proven by checkpoint.py
        return dtype

    def pieces(self, limit: int) -> Iterator["Piece"]:
        """The work in stretches that read and write at most `limit` bytes each, but at least an element's members.

        In the order of the result's bytes: whole rows of the dimensions before the axis where one fits, else
        slot by slot, and stretches of a slot.
        """
        if 0 in self.mean.shape(self.info.shape):
            return
        axis = self.mean.axis
        outer, inner = math.prod(self.info.shape[:axis]), math.prod(self.info.shape[axis + 1 :])
        row = self.info.shape[axis] * inner * self.dtype.itemsize
        out_row = self.nbytes // outer
        step = limit // max(row, out_row)
        if step:
            for start in range(0, outer, step):
                yield self._rows(start, min(step, outer - start), inner)
            return
        for place in range(outer):
            for slot in range(len(self.mean.members)):
                yield from self._slot(place, slot, inner, limit)

    def _rows(self, start: int, count: int, inner: int) -> "Piece":
        length = self.info.shape[self.mean.axis]
        nbytes = length * inner * self.dtype.itemsize
        return _PoolPiece(
            reads=((self.info.start + start * nbytes, count * nbytes),),
            shape=(count, length, inner),
            dtype=self.dtype,
            mean=replace(self.mean, axis=1),
            stand_ins=self.stand_ins,
        )

    def _slot(self, place: int, slot: int, inner: int, limit: int) -> Iterator["Piece"]:
        """One slot of the result at one place of the dimensions before the axis, in stretches of its elements."""
        stand_ins = [stand_in for stand_in in self.stand_ins if stand_in.slot == slot]
        members = self.mean.members[slot]
        sources = sorted({*members, *(stand_in.source for stand_in in stand_ins)})
        rank = {source: i for i, source in enumerate(sources)}
        weights = None if self.mean.weights is None else (self.mean.weights[slot],)
        mean = SlotMean(1, 1, (tuple(rank[member] for member in members),), weights)
        moved = tuple(StandIn(s.label, 0, rank[s.source], s.heads) for s in stand_ins)
        size, run = self.dtype.itemsize, self.mean.slot * inner
        slots = self.info.shape[self.mean.axis] // self.mean.slot
        step = max(1, limit // (len(sources) * size))
        for first in range(0, run, step):
            count = min(step, run - first)
            reads = tuple(
                (self.info.start + ((place * slots + source) * run + first) * size, count * size) for source in sources
            )
            yield _PoolPiece(reads, (1, len(sources), count), self.dtype, mean, moved)


@dataclass(frozen=True)
class Join:
    """A small tensor made of several, which may lie in other files: norms of which each head has its own.

    Attributes
    ----------
    reads : tuple of (path, first byte, bytes)
        One-dimensional tensors, laid one behind the other.
    dtype : dtype
    mean : SlotMean
    """

    reads: tuple[tuple[str, int, int], ...]
    dtype: np.dtype[Any]
    mean: SlotMean

    @property
    def source_length(self) -> int:
        """Elements read."""
        return sum(nbytes for _, _, nbytes in self.reads) // self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.mean.shape((self.source_length,))) * self.dtype.itemsize

    def pieces(self, limit: int) -> Iterator["Piece"]:
        """All at once: head_dim numbers."""
        yield _JoinPiece(self)


class _GivenPiece(NamedTuple):
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def fill(self, file: int, out: memoryview, sums: Sums) -> None:
        out[:] = self.data


class _CopyPiece(NamedTuple):
    start: int
    nbytes: int

    def fill(self, file: int, out: memoryview, sums: Sums) -> None:
        read_exactly(file, out, self.start)


class _PoolPiece(NamedTuple):
    """Slots of the result from stretches of the source, seen as (outer, along the axis, inner)."""

    reads: tuple[tuple[int, int], ...]  # first byte and bytes
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    mean: SlotMean
    stand_ins: tuple[StandIn, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.mean.shape(self.shape)) * self.dtype.itemsize

    def fill(self, file: int, out: memoryview, sums: Sums) -> None:
        source = np.empty(self.shape, self.dtype)
        view, done = source.view(np.uint8).reshape(-1).data, 0
        for start, nbytes in self.reads:
            read_exactly(file, view[done : done + nbytes], start)
            done += nbytes
        result = np.frombuffer(out, self.dtype).reshape(self.mean.shape(self.shape))
        self.mean.apply(source, result)
        slot = self.mean.slot
        for label, place, member, heads in self.stand_ins:
            old = source[:, member * slot : (member + 1) * slot]
            distance, norm = _distance(old, result[:, place * slot : (place + 1) * slot])
            before = sums.get(label, (0.0, 0.0))
            sums[label] = (before[0] + heads * distance, before[1] + heads * norm)


class _JoinPiece(NamedTuple):
    join: "Join"

    @property
    def nbytes(self) -> int:
        return self.join.nbytes

    def fill(self, file: int, out: memoryview, sums: Sums) -> None:
        source = np.empty(self.join.source_length, self.join.dtype)
        view, done = source.view(np.uint8).data, 0
        for path, start, nbytes in self.join.reads:
            with open(path, "rb", buffering=0) as other:
                read_exactly(other.fileno(), view[done : done + nbytes], start)
            done += nbytes
        self.join.mean.apply(source, np.frombuffer(out, self.join.dtype))


Piece = _GivenPiece | _CopyPiece | _PoolPiece | _JoinPiece
Part = Given | Copy | Pool | Join


def _distance(old: NDArray[Any], new: NDArray[Any]) -> tuple[float, float]:
    """Sums of (old - new)**2 and of old**2, in float64."""
    olds, news = old.reshape(-1), new.reshape(-1)
    distance = norm = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, olds.size, _BLOCK):
            wide = _wide(olds[start : start + _BLOCK])
            norm += _squares(wide)
            wide -= _wide(news[start : start + _BLOCK])
            distance += _squares(wide)
    return distance, norm


def _squares(numbers: NDArray[np.float64]) -> float:
    """Their sum, in this thread: a BLAS would wake its own for it, beside those that hash and write."""
    return float(np.einsum("i,i->", numbers, numbers))


def _wide(numbers: NDArray[Any]) -> NDArray[np.float64]:
    """Float64 copy. NumPy's own loop for bfloat16 is slow and holds the interpreter lock: its bits are float32's."""
    if numbers.dtype.itemsize == 2 and numbers.dtype.kind != "f":
        numbers = (numbers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64)


def read_exactly(file: int, out: memoryview, start: int) -> None:
    """Fill `out` from byte `start` on."""
    done = 0
    while done < len(out):
        got = os.preadv(file, [out[done:]], start + done)
        if not got:
            raise ValueError(f"the file ends at byte {start + done}; it became shorter while it was converted")
        done += got
