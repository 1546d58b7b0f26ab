"""What all charts share: colours, style, legends, SVG. No global state of pyplot."""

from __future__ import annotations

import io
import logging
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robustkit.results import Results

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#8c564b",
    "#4b6a9b",
    "#a5673f",
    "#2f6f4f",
    "#555555",
)
"""Okabe and Ito's colour-blind-safe colours first."""
MARKERS = "os^Dv<>ph*X"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robustkit",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
}


def quiet_fonts() -> None:
    """Keep the writers from logging a line for each font that they do not find; the font is the reader's anyway."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG text without a date, so that equal results give equal files."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def colours(results: Results) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each variant."""
    names = list(dict.fromkeys(row.name for row in results.variants))
    return {
        name: (PALETTE[number % len(PALETTE)], MARKERS[(number // len(PALETTE)) % len(MARKERS)])
        for number, name in enumerate(names)
    }


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in inches with its panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def legend(axes: Axes, count: int) -> None:
    """Put the legend of all that is drawn right of the last panel, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            unique.values(),
            [short(label) for label in unique],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8,
            ncols=1 if count <= 14 else 2,
        )


def short(name: str, limit: int = 34) -> str:
    """Return a name as text that matplotlib neither hides nor takes for mathematics, cut to `limit` letters."""
    # A leading underscore hides a label, a dollar starts mathematics.
    text = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return text.replace("$", r"\$").lstrip("_") or " "
