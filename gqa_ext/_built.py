"""Lets Python work in the root of a clone, where it finds this folder before the installed package.

The folder beside setup.py holds no compiled _core unless it was built in place. Importing it must not
fail where ``pip install .`` has just succeeded, so the package then takes its modules from the installed
copy. Called by __init__.py before anything else, with ``gqa_ext.__path__``.
"""

import itertools
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path


def use_built_package(path: list[str]) -> None:
    """Point ``path`` at a folder of sys.path that holds _core; ImportError if there is none."""
    here = Path(path[0]).absolute()
    for folder in itertools.chain([here], _folders_on_path()):
        if PathFinder.find_spec("gqa_ext._core", [str(folder)]) is not None:
            path[:] = [str(folder)]
            return
    raise ImportError(
        f"import gqa_ext: {here} is the source folder and holds no compiled gqa_ext._core for this Python; "
        f"the package must be built first: run `python -m pip install .` in {here.parent}"
    )


def _folders_on_path() -> Iterator[Path]:
    """Where sys.path may hold another copy."""
    for entry in sys.path:
        try:
            yield Path(entry).absolute() / "gqa_ext"
        except OSError:  # "" in a working directory that was deleted
            continue
