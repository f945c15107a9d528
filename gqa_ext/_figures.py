"""matplotlib, an optional extra: imported when a picture is drawn. Used by bench.py and convert/plots.py."""

import importlib
from typing import Any


def figure_class(call: str) -> Any:
    """``matplotlib.figure.Figure``, which needs neither pyplot nor a screen."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        fix = 'pip install "gqa-ext[plot]"'
        raise ImportError(f"{call}(): matplotlib is not installed; it draws the picture: {fix}") from None
