"""Lets Python work in the root of a clone, where it finds this folder before the installed package.

The folder beside setup.py holds no compiled _core unless it was built in place. Importing it must not
fail where ``pip install .`` has just succeeded, so the package then takes its modules from the installed
copy. Called by __init__.py before anything else, with ``gqa_ext.__path__``.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path


def use_built_package(path: list[str]) -> None:
    """Point ``path`` at the installed package if there is no _core here; ImportError if there is none anywhere."""
    if PathFinder.find_spec("gqa_ext._core", path) is not None:
        return
    here = Path(path[0]).resolve()
    elsewhere = [entry for entry in sys.path if (Path(entry) / "gqa_ext").resolve() != here]
    installed = PathFinder.find_spec("gqa_ext", elsewhere)
    folders = list(installed.submodule_search_locations or ()) if installed is not None else []
    if PathFinder.find_spec("gqa_ext._core", folders) is None:
        raise ImportError(
            f"import gqa_ext: {here} is the source folder and holds no compiled gqa_ext._core for this Python; "
            f"the package must be built first: run `python -m pip install .` in {here.parent}"
        )
    path[:] = folders
