"""One file of the result: written, hashed and put in place by a function that any process can call.

A task is picklable and idempotent: done twice, or at once by two processes, it leaves the same file. It runs in
its plan's folder (destination.py), where `files/` holds finished files and `done/` what is known of each; a file
counts as finished when both agree. Reading with pooling, hashing and writing go side by side on a few buffers.
Called by checkpoint.py, through executors.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .parts import Part, Sums
from .source import Stamp, stamp_of

__all__ = ["CHUNKS", "LANES", "FileRecord", "FileTask", "fsync_folder", "run_task", "write_text"]

LANES = 2  # tasks that run at once in one process
_RING = 4  # buffers of a task: one is filled, one hashed, one written, one in reserve
CHUNKS = _RING + 4  # of memory for each lane: the ring, the members of a pooled piece, and a copy of them, twice over
# The disk begins with what lies before a multiple of this: a page on its way there would make the next write wait.
_SETTLED = 1 << 21
Tick = Callable[[int], None]

_lanes = threading.BoundedSemaphore(LANES)


def _new_lanes() -> None:
    """A forked child may have inherited lanes whose owners it does not have."""
    global _lanes
    _lanes = threading.BoundedSemaphore(LANES)


os.register_at_fork(after_in_child=_new_lanes)


@dataclass(frozen=True)
class FileTask:
    """Everything that one file takes.

    Attributes
    ----------
    name : str
        Relative to the result.
    parts : tuple of Part
        What the file is, one behind the other.
    source : str or None
        The file that the parts read.
    stamp : Stamp or None
        How it looked when the plan was made.
    folder : str
        The plan's.
    attempt : str
        Keeps partial files of two runs apart.
    chunk : int
        Bytes of a buffer.
    """

    name: str
    parts: tuple[Part, ...]
    source: str | None
    stamp: Stamp | None
    folder: str
    attempt: str
    chunk: int

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def key(self) -> str:
        """A plain name for a name with folders."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class FileRecord:
    """What is known of a finished file."""

    name: str
    nbytes: int
    sha256: str
    sums: Sums
    resumed: bool = False


def run_task(task: FileTask, tick: Tick | None = None) -> FileRecord:
    """Make the file unless it is there; `tick` hears of bytes as they are done and may raise to stop."""
    with _lanes:
        record = _finished(task)
        if record is not None:
            if tick:
                tick(task.nbytes)
            return record
        folder = Path(task.folder)
        partial = folder / f"{task.key}-{task.attempt}.partial"
        try:
            record = _write(task, partial, tick or (lambda nbytes: None))
            write_text(folder / "done" / task.key, json.dumps(asdict(record)), task.attempt)
            final = folder / "files" / task.name
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, final)
            fsync_folder(final.parent)
        finally:
            partial.unlink(missing_ok=True)
        return record


def _finished(task: FileTask) -> FileRecord | None:
    """The record of a file that an earlier run made, if its bytes are still those."""
    folder = Path(task.folder)
    final = folder / "files" / task.name
    try:
        known: dict[str, Any] = json.loads((folder / "done" / task.key).read_text())
        with open(final, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    sums = {label: (pair[0], pair[1]) for label, pair in known["sums"].items()}
    return FileRecord(known["name"], known["nbytes"], known["sha256"], sums, resumed=True)


def _write(task: FileTask, partial: Path, tick: Tick) -> FileRecord:
    """The file under its partial name, on disk."""
    sums: Sums = {}
    source = -1 if task.source is None else os.open(task.source, os.O_RDONLY)
    try:
        _check_stamp(task, source)
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with _Ring(file, task.chunk) as ring:
                for part in task.parts:
                    for piece in part.pieces(task.chunk):
                        out = ring.buffer(piece.nbytes)
                        piece.fill(source, out, sums)
                        ring.put(out)
                        tick(piece.nbytes)
            os.ftruncate(file, task.nbytes)
            os.fsync(file)
        finally:
            os.close(file)
        _check_stamp(task, source)
    except ValueError as error:
        raise ValueError(f"convert_checkpoint(): {task.source}: {error}") from None
    finally:
        if source >= 0:
            os.close(source)
    return FileRecord(task.name, task.nbytes, ring.hash.hexdigest(), sums)


def _check_stamp(task: FileTask, source: int) -> None:
    if task.stamp is not None and stamp_of(os.fstat(source)) != task.stamp:
        raise ValueError("the file changed since its header was read; leave it alone and convert again")


class _Ring:
    """A few buffers on their way through hashing and writing, each in a thread of its own."""

    def __init__(self, file: int, chunk: int) -> None:
        self.hash = hashlib.sha256()
        self._file, self._end, self._settled = file, 0, 0
        self._buffers = [bytearray(chunk) for _ in range(_RING)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_RING)]
        self._turn = 0
        self._zeros = bytes(chunk)

    def __enter__(self) -> "_Ring":
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hashing.shutdown(cancel_futures=kind is not None)
        self._writing.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for pending in self._pending:
                for future in pending:
                    future.result()

    def buffer(self, nbytes: int) -> memoryview:
        """The first bytes of the buffer that has been free for longest."""
        for future in self._pending[self._turn]:
            future.result()
        return memoryview(self._buffers[self._turn])[:nbytes]

    def put(self, data: memoryview) -> None:
        """Hash and write what lies in the buffer that `buffer` gave."""
        self._pending[self._turn] = [
            self._hashing.submit(self.hash.update, data),
            self._writing.submit(self._write, data, self._end),
        ]
        self._end += len(data)
        self._turn = (self._turn + 1) % _RING

    def _write(self, data: memoryview, start: int) -> None:
        """At `start`; a stretch of zeros stays a hole, as in `cp`, and the disk starts on the rest at once."""
        if not any(data[:64]) and data == self._zeros[: len(data)]:
            return
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)
        settled = (start + len(data)) // _SETTLED * _SETTLED
        if settled > self._settled and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, self._settled, settled - self._settled, os.POSIX_FADV_DONTNEED)
            self._settled = settled


def write_text(path: Path, text: str, attempt: str) -> None:
    """A small file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}-{attempt}.partial")
    with open(partial, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def fsync_folder(path: Path) -> None:
    """Put on disk what names a folder has."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
