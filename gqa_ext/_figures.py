"""matplotlib, an optional extra: imported when a picture is drawn. Used by bench.py and convert/plots.py."""

import importlib
import os
from pathlib import Path
from typing import Any


def figure_class(call: str) -> Any:
    """``matplotlib.figure.Figure``, which needs neither pyplot nor a screen."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        fix = 'pip install "gqa-ext[plot]"'
        raise ImportError(f"{call}(): matplotlib is not installed; it draws the picture: {fix}") from None


def check_picture(call: str, path: str | os.PathLike[str]) -> None:
    """Whether a picture can be written there: ImportError, ValueError or FileNotFoundError."""
    figure_class(call)
    known = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.filetypes
    file = Path(path)
    if file.suffix[1:].lower() not in ("", *known):
        wanted = f"one of {', '.join(f'.{ending}' for ending in known)} was wanted"
        raise ValueError(f"{call}(): {file} ends in {file.suffix}; {wanted}: pass another name")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{call}(): {file} lies in a folder that does not exist: make {file.parent} first")
