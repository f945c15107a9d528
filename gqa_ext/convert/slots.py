"""The one operation of a conversion: along an axis a tensor is slots, and slots of the result are means of slots.

Pooled heads, heads repeated back, permuted heads and fused projections are all this with other members, so that
whoever applies a plan knows nothing of architectures. May assume that layouts.py proved the members to fit.
Called by layouts.py, which makes them, and by whatever applies them to arrays or files.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core

__all__ = ["Piece", "SlotMean"]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class SlotMean:
    """Along `axis` a tensor is slots of `slot` elements; each slot of the result is a mean of slots of the source.

    Attributes
    ----------
    axis : int
    slot : int
        Elements of a slot along `axis`; its length in the source is a multiple of it.
    members : tuple of tuples of int
        Slot i of the result is the mean of the source's slots ``members[i]``, the exact one rounded once; a single
        member is copied bit for bit. Lengths may differ.
    weights : tuple of tuples of float, optional
        As `members`: how much each counts, scaled as in ``methods.as_shares``. None is the plain mean.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[1.0], [3.0], [10.0]], np.float32)
    >>> pooled = SlotMean(axis=0, slot=1, members=((0, 1), (2,)))
    >>> out = np.empty(pooled.shape(rows.shape), np.float32)
    >>> pooled.apply(rows, out)
    >>> out.ravel()
    array([ 2., 10.], dtype=float32)
    """

    axis: int
    slot: int
    members: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...] | None = None

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the result for a source of shape `source`."""
        return (*source[: self.axis], len(self.members) * self.slot, *source[self.axis + 1 :])

    def apply(self, source: NDArray[Any], out: NDArray[Any]) -> None:
        """Fill `out`, of the source's dtype (float16, bfloat16, float32 or float64) and of :meth:`shape`.

        Any strides and byte order; the source may be read-only. Parts of both that are cut alike along another axis
        than `axis` give the same bits as the whole.
        """
        slots = source.shape[self.axis] // self.slot
        for start, stop in _runs(self.members):
            members = np.array(self.members[start:stop], np.int64)
            weights = None if self.weights is None else np.array(self.weights[start:stop], np.float64)
            part = out[_along(self.axis, start * self.slot, stop * self.slot)]
            _core.pool_heads(source, part, self.axis, slots, members, weights)

    def pieces(self, source: tuple[int, ...], max_elements: int) -> Iterator["Piece"]:
        """The work for a source of shape `source`, cut so that none reads and writes more than `max_elements`.

        In the order in which the result lies in memory, each piece one stretch of it: what the pieces give, one
        behind the other, is the result in C order. One element of the result with its members is never cut.
        """
        return _cut(Piece((slice(None),) * len(source), self, (slice(None),) * len(source)), source, 0, max_elements)

    def part(self, start: int, stop: int) -> tuple["SlotMean", int, int]:
        """Slots `start` to `stop` of the result: what makes them, of which slots of the source (first, one past last).

        Slots between first and last that are no members are not read.
        """
        chosen = self.members[start:stop]
        first, last = min(map(min, chosen)), max(map(max, chosen))
        members = tuple(tuple(member - first for member in group) for group in chosen)
        weights = None if self.weights is None else self.weights[start:stop]
        return SlotMean(self.axis, self.slot, members, weights), first, last + 1

    def split(self) -> "SlotMean":
        """The same in slots of one element."""
        each = range(self.slot)
        members = tuple(tuple(m * self.slot + i for m in group) for group in self.members for i in each)
        weights = None if self.weights is None else tuple(w for w in self.weights for _ in each)
        return SlotMean(self.axis, 1, members, weights)


class Piece(NamedTuple):
    """A part of the work: ``mean.apply(source[piece.source], out[piece.out])``."""

    source: Slices
    mean: SlotMean
    out: Slices


def _runs(members: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of groups of one length, which go to C together."""
    start = 0
    for _, run in itertools.groupby(members, len):
        stop = start + len(list(run))
        yield start, stop
        start = stop


def _along(axis: int, start: int, stop: int) -> Slices:
    return (slice(None),) * axis + (slice(start, stop),)


def _cut(piece: Piece, shape: tuple[int, ...], dim: int, limit: int) -> Iterator[Piece]:
    """Cut along `dim` and, where one index is still too much, along the later ones; earlier ones have length 1.

    `shape` is that of the piece's source.
    """
    mean = piece.mean
    if _cost(mean, shape) <= limit or dim == len(shape):
        yield piece
        return
    if dim == mean.axis and mean.slot > 1 and max(_cost(one, shape) for one in _each(mean)) > limit:
        mean = mean.split()
    length = len(mean.members) if dim == mean.axis else shape[dim]
    unit = max(_cost(one, shape) for one in _each(mean)) if dim == mean.axis else _cost(mean, shape) // length
    step = max(1, limit // unit)
    for start in range(0, length, step):
        stop = min(start + step, length)
        part, first, last, scale = mean, start, stop, 1
        if dim == mean.axis:
            (part, first, last), scale = mean.part(start, stop), mean.slot
        cut = Piece(
            _shifted(piece.source, dim, first * scale, last * scale), part,
            _shifted(piece.out, dim, start * scale, stop * scale),
        )  # fmt: skip
        yield from _cut(cut, (*shape[:dim], (last - first) * scale, *shape[dim + 1 :]), dim + 1, limit)


def _each(mean: SlotMean) -> Iterator[SlotMean]:
    """Slots of the result one by one, one for each number of members."""
    for group in {len(group): group for group in mean.members}.values():
        yield SlotMean(mean.axis, mean.slot, (group,))


def _cost(mean: SlotMean, shape: tuple[int, ...]) -> int:
    """Elements read and written."""
    others = math.prod(shape[: mean.axis]) * math.prod(shape[mean.axis + 1 :])
    return sum(len(group) + 1 for group in mean.members) * mean.slot * others


def _shifted(slices: Slices, dim: int, start: int, stop: int) -> Slices:
    return (*slices[:dim], slice(start, stop), *slices[dim + 1 :])
