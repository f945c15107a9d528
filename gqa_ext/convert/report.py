"""What a conversion did and what it cost. Made by checkpoint.py, once."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plots import as_html, draw

__all__ = ["ConversionReport", "LayerReport"]


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes
    ----------
    layer : int
    num_heads, num_kv_heads_before, num_kv_heads : int
        Query heads; key/value heads of the source; and after pooling (which "expanded" output repeats).
    key_error, value_error : float
        What pooling changed of the projection's weight: the Frobenius norm of the difference over that of what was
        there, counted for each query head. 0 where nothing changed.
    """

    layer: int
    num_heads: int
    num_kv_heads_before: int
    num_kv_heads: int
    key_error: float
    value_error: float


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_checkpoint` did.

    Attributes
    ----------
    source, destination : str
    architecture, method, output : str
    groups : dict of int to tuple of tuples of int
        For each layer, the query heads that share a key/value head.
    layers : tuple of LayerReport
    parameters_before, parameters_after : int
        Elements of all tensors.
    kv_bytes_before, kv_bytes_after : int
        Key/value cache of one token, all layers, in the dtype of the key projections.
    seconds : float
        Of this call; a resumed one had less to do.
    files : dict of str to str
        SHA-256 of each file of the result.
    skipped : tuple of str
        Files of the source that were not copied: weights in other formats, and what is too large.
    resumed : tuple of str
        Files that an earlier, interrupted run had finished.
    bits_per_token_before, bits_per_token_after : float or None
        Of the tokens given as ``evaluate=``, by the source and by the result.
    """

    source: str
    destination: str
    architecture: str
    method: str
    output: str
    groups: Mapping[int, tuple[tuple[int, ...], ...]]
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    seconds: float
    files: Mapping[str, str]
    skipped: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    bits_per_token_before: float | None = None
    bits_per_token_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; an error that is no number is None."""
        report = dataclasses.asdict(self)
        report["groups"] = {str(layer): [list(group) for group in groups] for layer, groups in self.groups.items()}
        for layer in report["layers"]:
            layer.update((key, None) for key in ("key_error", "value_error") if not math.isfinite(layer[key]))
        return report

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _repr_html_(self) -> str:
        """The report as tables, for notebooks."""
        return as_html(self)

    def plot(self, layer: int | None = None, *, axes: Any = None) -> Any:
        """Draw the error of each layer or, where `layer` is given, how alike its heads are.

        Parameters
        ----------
        layer : int, optional
            Draw cosine similarities, from -1 to 1, of the source's key heads and of its value heads in this layer,
            each head's weights taken as one vector. Heads that are alike lose little when they are pooled; blocks
            away from the diagonal suggest ``groups=``. The source's files are read for it.
        axes : matplotlib Axes, optional
            One to draw the errors into, or two for a layer; None makes a figure.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            matplotlib is not installed: the extra ``plot``.
        ValueError
            No such layer, or another number of axes.
        FileNotFoundError
            The source is gone.
        """
        return draw(self, layer, axes)

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> "ConversionReport":
        """The report of :meth:`to_dict`, also by way of JSON."""
        numbers: list[dict[str, Any]] = [
            {key: math.nan if n is None else n for key, n in row.items()} for row in report["layers"]
        ]
        layers = tuple(LayerReport(**row) for row in numbers)
        groups = {int(layer): tuple(map(tuple, lists)) for layer, lists in report["groups"].items()}
        lists = {name: tuple(report[name]) for name in ("skipped", "resumed")}
        return cls(**{**report, **lists, "layers": layers, "groups": groups})
