"""Who has which block: the books of PagedKVCache, which keeps the blocks themselves."""

import numpy as np

from ._messages import Array


class Blocks:
    """How many sequences have each block.

    A sequence gets the one behind its last, if that is free, and begins in the widest gap: a run of blocks is read
    as fast as keys side by side.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self.users = [0] * count
        self._is_free = np.ones(count, bool)

    def take(self, last: int) -> int:
        """There is one."""
        behind = last + 1
        block = behind if behind < len(self.users) and not self.users[behind] else self._in_widest_gap()
        self.users[block] = 1
        self._is_free[block] = False
        self.free -= 1
        return block

    def share(self, block: int) -> None:
        """One more sequence has it."""
        self.users[block] += 1

    def release(self, block: int) -> None:
        """One less."""
        self.users[block] -= 1
        if self.users[block] == 0:
            self._is_free[block] = True
            self.free += 1

    def _in_widest_gap(self) -> int:
        """Its middle, as another sequence may be growing into its start."""
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False)).reshape(-1, 2)
        begin, end = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
        middle: int = (begin + end) // 2
        return middle


class Sequences:
    """Lengths of sequences and the blocks that each has, in rows of two arrays: a batch is taken from them at once.

    Rows have the room of the longest, but memory for no more than they hold: the rest of their pages is not touched.
    """

    def __init__(self) -> None:
        self.lengths = np.zeros(8, np.int64)
        self.held = [0] * 8  # blocks of each
        self._blocks = np.zeros((8, 8), np.int64)
        self._unused = list(range(8))

    def add(self, like: int | None = None) -> int:
        """A row, of no tokens or those of another."""
        if not self._unused:
            rows = len(self.held)
            self._unused = list(range(rows, 2 * rows))
            self.lengths = np.concatenate([self.lengths, np.zeros_like(self.lengths)])
            self.held += [0] * rows
            self._resize(2 * rows, self._blocks.shape[1])
        row = self._unused.pop()
        self.lengths[row] = 0 if like is None else self.lengths[like]
        self.held[row] = 0 if like is None else self.held[like]
        if like is not None:
            self._blocks[row, : self.held[like]] = self._blocks[like, : self.held[like]]
        return row

    def remove(self, row: int) -> None:
        """Its blocks are the caller's to give back."""
        self.held[row] = 0
        self._unused.append(row)

    def blocks_of(self, row: int) -> list[int]:
        """All of them, in order."""
        blocks: list[int] = self._blocks[row, : self.held[row]].tolist()
        return blocks

    def last(self, row: int) -> int:
        """Its last block; -1, which is before the first, where it has none."""
        return int(self._blocks[row, self.held[row] - 1]) if self.held[row] else -1

    def push(self, row: int, block: int) -> None:
        """One more."""
        if self.held[row] == self._blocks.shape[1]:
            self._resize(len(self.held), 2 * self.held[row])
        self._blocks[row, self.held[row]] = block
        self.held[row] += 1

    def pop(self, row: int) -> int:
        """Its last, which it has no more."""
        self.held[row] -= 1
        return int(self._blocks[row, self.held[row]])

    def table(self, rows: list[int]) -> Array:
        """A new block table (len(rows), blocks); what follows a sequence's own may be anything."""
        return self._blocks[rows, : max([self.held[row] for row in rows], default=0)]

    def _resize(self, rows: int, width: int) -> None:
        old, self._blocks = self._blocks, np.zeros((rows, width), np.int64)
        for row in range(len(old)):
            self._blocks[row, : self.held[row]] = old[row, : self.held[row]]
