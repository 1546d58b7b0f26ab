"""A sensitivity scan as a chart and a table. Imports no torch."""

from __future__ import annotations

import io
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from robustkit.compress.layer_curves import Sensitivity
from robustkit.report.drawing import MARKERS, PALETTE, STYLE, quiet_fonts, short, to_svg
from robustkit.report.tables import count_text, percent, plain_rows
from robustkit.results import Rate

POINTS = 0.02
"""What a layer may cost in attacked accuracy before the table says that it does not bear a sparsity."""


def sensitivity_figure(found: Sensitivity) -> Figure:
    """Return clean and attacked accuracy by layer, one line a sparsity; dashed: nothing pruned."""
    names = [layer.name for layer in found.layers]
    figure = Figure(figsize=(min(18.0, 3.5 + 0.35 * len(names)), 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    clean = [layer.clean for layer in found.layers]
    attacked = [layer.attacked for layer in found.layers]
    _lines(upper, found.sparsities, clean, found.clean, "clean accuracy (%)")
    eps = f"{found.threat['norm']} {found.threat['eps']:.3g}"
    _lines(lower, found.sparsities, attacked, found.attacked, f"attacked accuracy (%), {eps}")
    lower.set_xticks(range(len(names)), [short(name, 30) for name in names], rotation=45, ha="right")
    upper.set_title(f"one layer at a time pruned by {found.method}; {found.clean.n} images", fontsize=9)
    upper.legend(title="sparsity", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def _lines(axes: Axes, sparsities: list[float], layers: list[list[float]], whole: Rate, label: str) -> None:
    values = 100 * np.array(layers, dtype=float).reshape(len(layers), len(sparsities))
    axes.axhspan(100 * whole.low, 100 * whole.high, color="black", alpha=0.07, lw=0)
    axes.axhline(100 * whole.value, color="black", lw=0.9, ls="--")
    for place, sparsity in enumerate(sparsities):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        label_of = f"{percent(sparsity, 0)} %"
        axes.plot(range(len(layers)), values[:, place], color=colour, marker=marker, ms=4, lw=1.3, label=label_of)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def drawn(found: Sensitivity, kind: Literal["svg", "png"]) -> bytes:
    """Return the chart as a file of this kind; equal scans give equal files."""
    quiet_fonts()
    with matplotlib.rc_context(STYLE):
        figure = sensitivity_figure(found)
        if kind == "svg":
            return to_svg(figure).encode()
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None}, pil_kwargs={"dpi": (144, 144)})
        return buffer.getvalue()


def table(found: Sensitivity) -> str:
    """Return one row a layer: size, attacked accuracy (clean behind it) at each sparsity, and what the layer bears."""
    head = ["layer", "size", *(f"{percent(one, 0)} %" for one in found.sparsities), "bears"]
    rows = [["(nothing pruned)", "", *[_cell(found.attacked.value, found.clean.value)] * len(found.sparsities), ""]]
    for layer in found.layers:
        cells = [_cell(bad, good) for bad, good in zip(layer.attacked, layer.clean, strict=True)]
        borne = layer.bears(found.sparsities, found.attacked.value, POINTS)
        rows.append(
            [layer.name, count_text(layer.size), *cells, f"{percent(borne, 0)} %" if borne else "none of these"]
        )
    return plain_rows(head, rows)


def _cell(attacked: float, clean: float) -> str:
    return f"{percent(attacked)} ({percent(clean)})"
