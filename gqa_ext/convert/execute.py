"""Runs tasks on whatever has `submit`, and tells how far they are. Called by checkpoint.py."""

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from .._messages import fail, kind
from .tasks import LANES, FileRecord, FileTask, run_task

__all__ = ["Progress", "execute"]

_TICK = 0.1  # seconds between two calls of progress, and at most until Ctrl-C is heard


class _Stopped(Exception):
    """Ends a task whose run has failed elsewhere."""


class Progress:
    """Bytes done by any thread, told from the thread that called us.

    Parameters
    ----------
    shown : callable, bool or None
        As convert_checkpoint's `progress`.
    """

    def __init__(self, shown: Any) -> None:
        if shown is not None and not isinstance(shown, bool) and not callable(shown):
            wanted = "None, True, False or a callable(done_bytes, total_bytes) was wanted"
            fail(TypeError, "convert_checkpoint", f"progress is {kind(shown)}", wanted, "leave it out")
        self.total = 0
        self.stopped = False
        self._shown, self._bar = shown, None
        self._done = self._told = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        if self._shown is True or (self._shown is None and sys.stderr is not None and sys.stderr.isatty()):
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=self.total, unit="B", unit_scale=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, nbytes: int) -> None:
        """Count bytes; in any thread."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done += nbytes

    def tell(self) -> None:
        """Call or draw what is watched, if there is news."""
        done = self._done
        if done == self._told:
            return
        if self._bar is not None:
            self._bar.update(done - self._told)
        self._told = done
        if callable(self._shown):
            self._shown(done, self.total)


def execute(tasks: Sequence[FileTask], executor: Any, progress: Progress) -> list[FileRecord]:
    """Run all tasks, in this process where there is no executor; the first error stops the others."""
    if executor is None:
        return _in_threads(tasks, progress)
    futures: list[Any] = []
    try:
        records = []
        futures += [executor.submit(run_task, task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            records.append(future.result())
            progress.add(task.nbytes)
            progress.tell()
    except BaseException:
        _abandon(futures)
        raise
    return records


def _abandon(futures: Sequence[Any]) -> None:
    """Cancel what has not begun and wait for the rest, so that nobody writes after us."""
    for future in futures:
        future.cancel()
    for future in futures:
        try:
            if not future.cancelled():
                future.exception()
        except Exception:  # some other library's way to say that it was cancelled
            continue


def _in_threads(tasks: Sequence[FileTask], progress: Progress) -> list[FileRecord]:
    with ThreadPoolExecutor(LANES) as pool:
        futures: list[Future[FileRecord]] = [pool.submit(run_task, task, progress.add) for task in tasks]
        try:
            waiting: set[Future[FileRecord]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, _TICK, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress.tell()
        except BaseException:
            progress.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]
