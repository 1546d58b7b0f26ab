"""The report's charts as SVG. The same variant has the same colour in all of them; no global state of pyplot."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from robustkit.report.tables import attack_labels, display_name, tree_order
from robustkit.results import Curve, Results, VariantResult

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
SIZES: dict[str, Callable[[VariantResult], float | None]] = {
    "non-zero parameters": lambda row: float(row.nonzero),
    "gzipped bytes": lambda row: float(row.gzip_bytes),
    "latency, batch 1 (ms)": lambda row: row.latency_ms.get("batch_1"),
}


def figures(results: Results) -> dict[str, str]:
    """Return {name: SVG} of every chart that the results have data for."""
    makers: dict[str, Callable[[Results], Figure | None]] = {
        "tradeoff": tradeoff,
        "curves": security_curves,
        "size": size,
        "attacks": attack_map,
        "classes": class_map,
        "training": training,
    }
    # The SVG writer logs a line for each font it does not find; the font is the reader's anyway.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    found = {}
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            figure = make(results)
            if figure is not None:
                found[name] = to_svg(figure)
    return found


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


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def _legend(axes: Axes, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            unique.values(),
            [_short(label) for label in unique],
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8,
            ncols=1 if count <= 14 else 2,
        )


def _short(name: str, limit: int = 34) -> str:
    # A leading underscore hides a label, a dollar starts mathematics.
    text = name if len(name) <= limit else f"{name[: limit - 1]}…"
    return text.replace("$", r"\$").lstrip("_") or " "


def tradeoff(results: Results) -> Figure | None:
    """Worst-case against clean accuracy, with intervals, and an arrow from each parent to its child."""
    if not any(row.attacks for row in results.variants):
        return None
    figure, (axes,) = _figure(8.6, 4.4)
    looks = colours(results)
    rows = {(row.name, row.seed): row for row in results.variants}
    for row in results.variants:
        colour, marker = looks[row.name]
        x, y = 100 * row.clean.value, 100 * row.worst.value
        x_error = [[x - 100 * row.clean.low], [100 * row.clean.high - x]]
        y_error = [[y - 100 * row.worst.low], [100 * row.worst.high - y]]
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, color=colour, alpha=0.35, lw=1, zorder=1)
        axes.plot(x, y, marker, color=colour, ms=7, label=row.name, zorder=3)
        parent = rows.get((row.parent or "", row.seed))
        if parent is not None:
            start = (100 * parent.clean.value, 100 * parent.worst.value)
            arrow = {"arrowstyle": "->", "color": colour, "lw": 1.4, "shrinkA": 4, "shrinkB": 4}
            axes.annotate("", (x, y), start, arrowprops=arrow, zorder=2)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel("worst case over attacks (%)")
    axes.set_ylim(bottom=min(-2.0, axes.get_ylim()[0]))
    _legend(axes, len(looks))
    return figure


def security_curves(results: Results) -> Figure | None:
    """Accuracy against eps with bands; random noise of the same size dashed; the threat's eps as a line.

    Of minimum-norm attacks the whole curve, in steps, as their distances give it.
    """
    if not any(row.curves or row.distances for row in results.variants):
        return None
    figure, (axes,) = _figure(8.6, 4.2)
    looks = colours(results)
    for row in results.variants:
        for curve in row.curves:
            _curve(axes, row, curve, looks[row.name][0])
        for found in row.distances.values():
            accuracy = [100 * share for share in found.accuracy]
            axes.step(found.eps, accuracy, where="post", color=looks[row.name][0], lw=1.2, ls="-.", label=row.name)
    eps = results.threat.get("eps")
    if isinstance(eps, int | float):
        axes.axvline(float(eps), color="black", lw=0.8, ls=":")
        axes.annotate(f" eps {eps:.3g}", (float(eps), 101), fontsize=8, annotation_clip=False)
    axes.set_ylim(-2, 102)
    unit = "changed values" if results.threat.get("norm") == "l0" else "of the range [0, 1]"
    axes.set_xlabel(f"eps ({results.threat.get('norm', '')}, {unit})")
    axes.set_ylabel("accuracy (%)")
    _legend(axes, len(looks))
    return figure


def _curve(axes: Axes, row: VariantResult, curve: Curve, colour: str) -> None:
    order = np.argsort(curve.eps)
    x = np.array(curve.eps)[order]
    values, low, high = (
        100 * np.array([getattr(curve.rates[place], side) for place in order]) for side in ("value", "low", "high")
    )
    if curve.attack == "noise":
        axes.plot(x, values, color=colour, lw=1, ls="--", alpha=0.6)
        return
    axes.plot(x, values, color=colour, lw=1.8, marker="o", ms=3, label=row.name)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)


def size(results: Results) -> Figure | None:
    """Worst-case accuracy against non-zero parameters, gzipped bytes and latency; the front is ringed."""
    panels = {name: get for name, get in SIZES.items() if any(get(row) is not None for row in results.variants)}
    if not panels or not any(row.attacks for row in results.variants):
        return None
    figure, axes = _figure(3.3 * len(panels) + 2.0, 3.6, len(panels))
    looks = colours(results)
    for place, (name, get) in zip(axes, panels.items(), strict=True):
        for row in results.variants:
            value = get(row)
            if value is None:
                continue
            colour, marker = looks[row.name]
            place.plot(value, 100 * row.worst.value, marker, color=colour, ms=6, label=row.name)
            if row.pareto and name == "gzipped bytes":
                place.plot(value, 100 * row.worst.value, "o", mfc="none", mec="black", ms=11, mew=1)
        place.set_xlabel(name)
        _size_scale(place, [value for row in results.variants if (value := get(row))])
    axes[0].set_ylabel("worst case (%)")
    _legend(axes[-1], len(looks))
    return figure


def _size_scale(axes: Axes, values: list[float]) -> None:
    """A log scale over a decade or more, else a linear one from zero, where equal sizes and speeds look equal."""
    if values and max(values) >= 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlim(0, 1.08 * max(values, default=1))
    if values and max(values) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def attack_map(results: Results) -> Figure | None:
    """Accuracy of each variant under each attack; the strongest attack of each row is outlined."""
    labels = attack_labels(results)
    if not labels:
        return None
    rows = tree_order(results)
    values = [[100 * row.attacks[label].value if label in row.attacks else np.nan for label in labels] for row in rows]
    names = [display_name(row, results) for row in rows]
    return _heat_map(values, labels, names)


def class_map(results: Results) -> Figure | None:
    """Worst-case accuracy of each class; the worst class of each row is outlined."""
    rows = [row for row in tree_order(results) if row.per_class.get("worst")]
    if not rows:
        return None
    classes = list(dict.fromkeys(name for row in rows for name in row.per_class["worst"]))[:40]
    values = [[100 * row.per_class["worst"].get(name, np.nan) for name in classes] for row in rows]
    return _heat_map(values, classes, [display_name(row, results) for row in rows])


def _heat_map(values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]) -> Figure:
    """A table in colours; the lowest value of each row is outlined."""
    width = min(12.0, 3.2 + 0.62 * len(columns))
    figure, (axes,) = _figure(max(5.0, width), 1.1 + 0.3 * len(rows))
    table = np.ma.masked_invalid(np.array(values, dtype=float))
    axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), [_short(name, 16) for name in columns], rotation=35, ha="left")
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(np.array(values, dtype=float)):
        if not np.isnan(value):
            ink = "white" if value < 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=8)
    for place, given in enumerate(values):
        if not all(np.isnan(given)):
            column = int(np.nanargmin(given))
            axes.add_patch(Rectangle((column - 0.5, place - 0.5), 1, 1, fill=False, lw=2, ec="black"))
    return figure


def training(results: Results) -> Figure | None:
    """Loss, clean and attacked validation accuracy by epoch."""
    rows = [row for row in results.variants if row.epochs]
    if not rows:
        return None
    robust = any(epoch.robust is not None for row in rows for epoch in row.epochs)
    figure, axes = _figure(10.6, 3.4, 3 if robust else 2)
    looks = colours(results)
    for row in rows:
        colour = looks[row.name][0]
        x = [epoch.epoch + 1 for epoch in row.epochs]
        axes[0].plot(x, [epoch.loss for epoch in row.epochs], color=colour, lw=1.2, label=row.name)
        axes[1].plot(x, [100 * epoch.clean for epoch in row.epochs], color=colour, lw=1.2, label=row.name)
        tested = [(epoch.epoch + 1, epoch.test_accuracy) for epoch in row.epochs if epoch.test_accuracy is not None]
        axes[1].plot(*_columns((number, 100 * accuracy) for number, accuracy in tested), color=colour, lw=1, ls=":")
        if robust:
            known = [(epoch.epoch + 1, 100 * epoch.robust) for epoch in row.epochs if epoch.robust is not None]
            axes[2].plot(*_columns(known), color=colour, lw=1.2)
    tests = any(epoch.test_accuracy is not None for row in rows for epoch in row.epochs)
    clean = "clean validation (%), test dotted" if tests else "clean validation (%)"
    for place, title in zip(axes, ("training loss", clean, "attacked validation (%)"), strict=False):
        place.set_title(title, fontsize=9)
        place.set_xlabel("epoch")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = axes[2] if robust else axes[1]
    if robust:
        for row in rows:
            last.plot([], [], color=looks[row.name][0], label=row.name)
    _legend(last, len(looks))
    return figure


def _columns(pairs: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    known = list(pairs)
    return [x for x, _ in known], [y for _, y in known]
