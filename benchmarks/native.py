"""Compiles a C file beside this one when it runs. Used by read_speed.py and ggml_attention.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compiled(source: str, flags: Sequence[str], links: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made of `source`; ImportError, with the reason, where that cannot be."""
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if compiler is None:
        raise ImportError(f"no C compiler (cc, gcc or clang) for {source}")
    with tempfile.TemporaryDirectory(prefix="gqa-bench-") as folder:
        library = str(Path(folder, "library.so"))
        command = [compiler, *flags, "-shared", "-fPIC", str(Path(__file__).with_name(source)), *links, "-o", library]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise ImportError(f"{compiler} does not compile {source}: {done.stderr.strip()[:200]}")
        try:
            return ctypes.CDLL(library)
        except OSError as error:
            raise ImportError(f"{source} was compiled but cannot be loaded: {error}") from error
