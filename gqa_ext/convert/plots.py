"""A report as a page of HTML and as pictures. matplotlib (extra ``plot``) is imported when a picture is drawn.

Called by report.py's methods.
"""

import html
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._figures import figure_class
from .._messages import short
from .header import DTYPES
from .parts import read_exactly

__all__ = ["as_html", "draw", "head_similarity"]

Report = Any  # a ConversionReport, whose file imports this one
ROLES = ("key", "value")


def as_html(report: Report) -> str:
    """A table of facts and one of layers; every text is escaped."""
    facts = {
        "source": report.source,
        "destination": report.destination,
        "architecture": report.architecture,
        "method, output": f"{report.method}, {report.output}",
        "parameters": f"{report.parameters_before:,} → {report.parameters_after:,}",
        "KV bytes per token": f"{report.kv_bytes_before:,} → {report.kv_bytes_after:,}",
        "seconds": f"{report.seconds:.2f}",
    }
    if report.bits_per_token_before is not None and report.bits_per_token_after is not None:
        facts["bits per token"] = f"{report.bits_per_token_before:.3f} → {report.bits_per_token_after:.3f}"
    head = ("layer", "heads", "key/value heads", "key error", "value error")
    rows: list[tuple[str, ...]] = [
        (
            str(row.layer), str(row.num_heads), f"{row.num_kv_heads_before} → {row.num_kv_heads}",
            f"{row.key_error:.4f}", f"{row.value_error:.4f}",
        )
        for row in report.layers
    ]  # fmt: skip
    return (
        "<div><b>ConversionReport</b>" + _table([], list(facts.items())) + _table(list(head), rows)
        + "<details><summary>files (SHA-256)</summary>" + _table([], list(report.files.items())) + "</details></div>"
    )  # fmt: skip


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [_row("th", tuple(head))] if head else []
    return "<table>" + "".join(lines + [_row("td", row) for row in rows]) + "</table>"


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def head_similarity(report: Report, layer: int, role: str = "key") -> NDArray[np.float64]:
    """Cosine similarity of the heads of one projection of the source: (heads, heads), read from its file.

    Entry (i, j) is the cosine of the angle between the weights of key/value heads i and j, each flattened to one
    vector. Pooling loses little where the heads of a group are alike, near 1; trained heads are mostly near 0, for
    nothing makes two heads agree on a basis. A head of zeros is like none: 0.
    """
    from .layouts import plan_model
    from .source import open_source

    if role not in ROLES:
        raise ValueError(f"head_similarity(): role is {short(role)}; 'key' or 'value' was wanted")
    known = {row.layer: row for row in report.layers}
    if layer not in known:
        raise ValueError(f"head_similarity(): layer is {short(layer)}; one of 0 to {max(known)} was wanted")
    source, row = open_source(report.source), known[layer]
    before = [other.num_kv_heads_before for other in report.layers]
    plan = plan_model(source.config, source.tensors, before, output="expanded", allow_gqa=True, num_heads=row.num_heads)
    heads = next(getattr(layer_plan, role) for layer_plan in plan.layers if layer_plan.index == layer)
    shard = source.shards[source.shard_of(heads.name)]
    info = shard.header.tensors[heads.name]
    dtype = DTYPES[info.dtype][1]
    assert dtype is not None  # plan_model pools four dtypes
    raw = bytearray(info.nbytes)
    with open(shard.path, "rb") as file:
        read_exactly(file.fileno(), memoryview(raw), shard.data_start + info.start)
    slots = np.moveaxis(np.frombuffer(raw, dtype).reshape(info.shape), heads.axis, 0)
    slots = slots.reshape(-1, heads.slot, *slots.shape[1:])
    wide = slots[list(dict.fromkeys(heads.before))].astype(np.float64)
    rows = wide.reshape(len(wide), -1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(unit @ unit.T)


def draw(report: Report, layer: int | None, axes: Any) -> Any:
    """The error of each layer or, where a layer is named, the similarity of its heads; returns the figure."""
    make_figure = figure_class("ConversionReport.plot")
    wanted = 1 if layer is None else 2
    if axes is None:
        axes = make_figure(figsize=(5 * wanted, 4), layout="constrained").subplots(1, wanted, squeeze=False)
    cells = np.asarray(axes).ravel()
    if cells.size != wanted:
        raise ValueError(f"ConversionReport.plot(): axes has {cells.size} axes; {wanted} were wanted")
    if layer is None:
        _draw_errors(report, cells[0])
    else:
        for role, cell in zip(ROLES, cells, strict=True):
            _draw_similarity(report, layer, role, cell)
    return cells[0].figure


def _draw_errors(report: Report, axes: Any) -> None:
    numbers = [row.layer for row in report.layers]
    for offset, role in ((-0.2, "key"), (0.2, "value")):
        errors = [getattr(row, f"{role}_error") for row in report.layers]
        heights = [error if math.isfinite(error) else 0.0 for error in errors]
        axes.bar([number + offset for number in numbers], heights, width=0.4, label=role)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the projection")
    axes.set_title(f"{report.architecture}, method {report.method}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.3)  # room for the legend
    axes.legend(loc="upper right", ncols=2)


def _draw_similarity(report: Report, layer: int, role: str, axes: Any) -> None:
    image = axes.imshow(head_similarity(report, layer, role), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_title(f"layer {layer}: cosine of {role} heads")
    axes.set_xlabel("head")
    axes.set_ylabel("head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
