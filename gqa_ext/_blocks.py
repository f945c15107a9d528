"""Who has which block: the books of PagedKVCache, which keeps the blocks themselves."""

from collections.abc import Iterable

import numpy as np

from ._messages import Array


class Blocks:
    """How many sequences have each block.

    A sequence gets the block behind its last, if that is free, and begins in the widest gap: a run of blocks is read
    as fast as keys side by side.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self.users = np.zeros(count, np.int64)

    def take(self, last: int) -> int:
        """A free block, of which there is one, for a sequence whose last is this one; -1: it has none."""
        behind = last + 1
        goes_on = 0 < behind < len(self.users) and self.users[behind] == 0
        block = behind if goes_on else self._in_widest_gap()
        self.users[block] = 1
        self.free -= 1
        return block

    def share(self, block: int) -> None:
        """One more sequence has it."""
        self.users[block] += 1

    def release(self, block: int) -> None:
        """One less."""
        self.users[block] -= 1
        self.free += int(self.users[block] == 0)

    def recount(self, sequences: Iterable["Sequence"]) -> None:
        """By what these have, whatever a call that was stopped has left."""
        rows = [sequence.row() for sequence in sequences]
        self.users = np.bincount(np.concatenate([np.zeros(0, np.int64), *rows]), minlength=len(self.users))
        self.free = int((self.users == 0).sum())

    def _in_widest_gap(self) -> int:
        """Its middle, as the sequence before it may be growing into its start."""
        edges = np.flatnonzero(np.diff(self.users == 0, prepend=False, append=False)).reshape(-1, 2)
        begin, end = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
        middle: int = (begin + end) // 2 if begin else 0
        return middle


class Sequence:
    """How many tokens it has, and the blocks that they are in."""

    def __init__(self) -> None:
        self.length = 0
        self.held = 0  # blocks
        self._row = np.zeros(8, np.int64)  # the blocks, and room that doubles when it is full

    def fork(self) -> "Sequence":
        """The same tokens in the same blocks."""
        other = Sequence()
        other.length, other.held, other._row = self.length, self.held, self._row[: max(8, self.held)].copy()
        return other

    def blocks(self) -> list[int]:
        """All of them, in order."""
        blocks: list[int] = self.row().tolist()
        return blocks

    def last(self) -> int:
        """The last block; -1: there is none."""
        return int(self._row[self.held - 1]) if self.held else -1

    def push(self, block: int) -> None:
        """One more block."""
        if self.held == len(self._row):
            self._row = np.concatenate([self._row, np.zeros_like(self._row)])
        self._row[self.held] = block
        self.held += 1

    def replace_last(self, block: int) -> None:
        """This block where the last one was."""
        self._row[self.held - 1] = block

    def restore(self, length: int, blocks: int, last: int) -> None:
        """Back to so many tokens and blocks, of which this was the last."""
        self.length, self.held = length, blocks
        if blocks:
            self.replace_last(last)

    def row(self) -> Array:
        """Its blocks, (held,): a view."""
        return self._row[: self.held]


def block_table(sequences: list[Sequence]) -> Array:
    """A new block table (len(sequences), blocks): every step of decoding makes one."""
    width = max([sequence.held for sequence in sequences], default=0)
    table = np.zeros((len(sequences), width), np.int64)
    for line, sequence in zip(table, sequences, strict=True):
        line[: sequence.held] = sequence.row()
    return table
