"""Where a result appears: whole or not at all, never in the source, never through a link.

Files are made in a work folder and renamed into place when all are finished. It lies beside a destination that is
not there yet, which then appears by one rename, or inside one that is, whose files are then replaced one by one.

    .NAME.gqa-ext/ (beside) or .gqa-ext/ (inside)
        lock             held by whoever writes; the system lets go of it when a process dies
        DIGEST/          one plan over one state of the source: nothing of another can get in
            files/ done/ finished files, and what is known of them (tasks.py)
            publish.json written when all files are finished; whoever finds it completes the renaming first

Called by checkpoint.py.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .source import CALL, CONFIG, INDEX, WEIGHTS, Source, plain_name
from .tasks import fsync_folder, write_text

__all__ = ["Destination"]

_PUBLISH = "publish.json"
_busy: set[Path] = set()  # work folders of this process; a lock of fcntl's does not keep a process from itself
_busy_lock = threading.Lock()


class Destination:
    """A folder to be made or filled; creating the object checks and writes nothing.

    Parameters
    ----------
    dst : path-like
    source : Source
        Never written into.
    overwrite : bool
        Whether files of a model that are there may be replaced.
    """

    def __init__(self, dst: str | os.PathLike[str], source: Source, overwrite: bool) -> None:
        given = os.fspath(dst)
        self.path = Path(os.path.realpath(given))
        self._overwrite = overwrite
        self._sources = {os.path.realpath(path) for path in (source.folder, *source.files())}
        self._work = self.path.parent / f".{self.path.name}.gqa-ext"
        if self.path.is_dir() and not os.path.lexists(self._work):
            self._work = self.path / ".gqa-ext"
        if os.path.islink(given.rstrip("/") or "/"):
            raise ValueError(f"{CALL}: dst {given} is a link, and nothing is written through one; pass {self.path}")
        if os.path.lexists(self._work) and not stat.S_ISDIR(self._work.lstat().st_mode):
            raise ValueError(f"{CALL}: {self._work} is in the way, where partial files go; remove it")
        _check_apart(self.path, source)

    def check(self, names: Iterable[str]) -> None:
        """Refuse what stands where `names` shall go."""
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise FileExistsError(errno.EEXIST, f"{CALL}: dst is a file; a new folder was wanted", str(self.path))
        others = sorted(name for name in os.listdir(self.path) if self.path / name != self._work)
        if others and not self._overwrite:
            what = f"{CALL}: dst is there and holds {', '.join(others[:3])}; pass overwrite=True or another dst"
            raise FileExistsError(errno.EEXIST, what, str(self.path))
        for name in names:
            for place in (*reversed(Path(name).parents[:-1]), Path(name)):
                _check_place(self.path / place, place == Path(name))
                if str(self.path / place) in self._sources:
                    raise ValueError(f"{CALL}: {self.path / place} is the source's; pass a dst apart from it")

    @contextlib.contextmanager
    def opened(self, digest: str, names: list[str]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        """The plan's folder, locked, and the report of a run that was killed while it renamed, now completed.

        An error leaves finished shards for the next run of the same plan, and else nothing.
        """
        if not self._work.exists():
            self.check(names)
        made = _make_folders(self._work.parent)
        with self._locked():
            folder = self._work / digest
            try:
                report = self._complete(digest)
                if report is None:
                    self.check(names)
                    self._clean(keep=digest)
                    for part in ("files", "done"):
                        (folder / part).mkdir(parents=True, exist_ok=True)
                yield folder, report
            except BaseException as error:
                if self._leave(folder):
                    error.add_note(f"Finished shards wait in {self._work}; the same call goes on from there.")
                raise
            finally:
                if not (self._work / digest).exists():
                    self._remove_work(made if not self.path.exists() else [])

    def publish(self, digest: str, names: list[str], report: dict[str, Any], attempt: str) -> None:
        """Let the finished files appear under their names, `names` in order and so the config last."""
        self.check(names)  # somebody may have made dst meanwhile
        folder = self._work / digest
        for root, _, _ in os.walk(folder / "files"):
            fsync_folder(Path(root))
        plan = {"names": names, "stale": self._stale(names), "report": report}
        write_text(folder / _PUBLISH, json.dumps(plan), attempt)
        fsync_folder(folder)
        self._complete(digest)

    def _complete(self, digest: str) -> dict[str, Any] | None:
        """Finish any renaming that was begun; the report if it was this plan's."""
        for path in sorted(self._work.glob(f"*/{_PUBLISH}")):
            plan = json.loads(path.read_text(encoding="utf-8"))
            self._rename(path.parent / "files", plan["names"], plan["stale"])
            for part in ("files", "done"):
                shutil.rmtree(path.parent / part, ignore_errors=True)
            path.unlink()  # last: until then a run that is killed here comes back to here
            shutil.rmtree(path.parent)
            if path.parent.name == digest:
                return dict(plan["report"])
        return None

    def _rename(self, files: Path, names: list[str], stale: list[str]) -> None:
        if not os.path.lexists(self.path):
            os.rename(files, self.path)
            fsync_folder(self.path.parent)
            return
        if not files.exists():  # killed after the one rename
            return
        for name in stale:
            if name not in names or (files / name).exists():  # else it is the new one: an earlier run came this far
                (self.path / name).unlink(missing_ok=True)
        for name in names:
            if not (files / name).exists():
                continue
            for parent in reversed(Path(name).parents[:-1]):
                _check_place(self.path / parent, False)
                (self.path / parent).mkdir(exist_ok=True)
            _check_place(self.path / name, True)
            os.replace(files / name, self.path / name)
        fsync_folder(self.path)

    def _stale(self, names: list[str]) -> list[str]:
        """Files of the model that is replaced, config first: without it nobody loads a mixture."""
        if not self.path.is_dir():
            return []
        found = [CONFIG, INDEX, WEIGHTS]
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shards = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            found += [name for name in dict.fromkeys(shards) if plain_name(name) and name.endswith(".safetensors")]
        return [name for name in found if name in (CONFIG, INDEX) or name not in names]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the work folder, or say who does."""
        busy = FileExistsError(errno.EEXIST, f"{CALL}: another run is writing dst; wait for it", str(self.path))
        with _busy_lock:
            if self._work in _busy:
                raise busy
            _busy.add(self._work)
        try:
            lock = self._lock(busy)
            try:
                yield
            finally:
                os.close(lock)
        finally:
            _busy.discard(self._work)

    def _lock(self, busy: FileExistsError) -> int:
        """The lock's descriptor; a lock that its last holder just removed is no lock."""
        while True:
            self._work.mkdir(exist_ok=True)
            try:
                lock = os.open(self._work / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_ino == os.stat(self._work / "lock").st_ino:
                    return lock
            except (BlockingIOError, PermissionError):
                os.close(lock)
                raise busy from None
            except FileNotFoundError:
                pass
            os.close(lock)

    def _clean(self, keep: str) -> None:
        """Remove other plans' folders and the partial files of runs that died."""
        for entry in self._work.iterdir():
            if entry.is_dir() and not entry.is_symlink() and entry.name != keep:
                shutil.rmtree(entry)
        for partial in (*self._work.glob("*/*.partial"), *self._work.glob("*/*/*.partial")):
            partial.unlink(missing_ok=True)

    def _leave(self, folder: Path) -> bool:
        """After an error: whether there are finished shards, which then stay."""
        if any(path.suffix == ".safetensors" for path in (folder / "files").glob("*")) or (folder / _PUBLISH).exists():
            return True
        shutil.rmtree(folder, ignore_errors=True)
        return False

    def _remove_work(self, made: list[Path]) -> None:
        with contextlib.suppress(OSError):
            (self._work / "lock").unlink()
            self._work.rmdir()
            for path in reversed(made):
                path.rmdir()


def _make_folders(path: Path) -> list[Path]:
    """Make a folder with its parents; which are new, outermost first."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()][::-1]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _check_apart(path: Path, source: Source) -> None:
    """dst is not the source, nor in it, nor a folder that the source's links lead to."""
    for parent in (path, *path.parents):
        inside = source.path.is_dir() or parent == path
        if inside and parent.exists() and os.path.samefile(parent, source.folder):
            raise ValueError(f"{CALL}: dst {path} lies in the source {source.folder}; pass a folder outside it")
    for file in source.files():
        if path.exists() and os.path.samefile(path, os.path.dirname(os.path.realpath(file))):
            raise ValueError(f"{CALL}: dst {path} holds {file} of the source; pass a folder that does not")


def _check_place(path: Path, last: bool) -> None:
    """A file that is replaced is a file or a link; the folders above it are folders and no links."""
    if not os.path.lexists(path):
        return
    if stat.S_ISDIR(path.lstat().st_mode) == last:
        wanted = "a file" if last else "a folder and no link"
        raise ValueError(f"{CALL}: {path} is in the way, where {wanted} goes; remove it or pass another dst")
