"""The one operation of a conversion: along an axis a tensor is slots, and slots of the result are means of slots.

Pooled heads, heads repeated back, permuted heads and fused projections are all this with other members, so that
whoever applies a plan knows nothing of architectures. May assume that layouts.py proved the members to fit.
Called by layouts.py, which makes them, and by whatever applies them to arrays or files.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core

__all__ = ["SlotMean"]

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


def _runs(members: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of groups of one length, which go to C together."""
    start = 0
    for _, run in itertools.groupby(members, len):
        stop = start + len(list(run))
        yield start, stop
        start = stop


def _along(axis: int, start: int, stop: int) -> Slices:
    return (slice(None),) * axis + (slice(start, stop),)
