"""The report's charts as SVG. The same variant has the same colour in all of them; no global state of pyplot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from robustkit.report.drawing import STYLE, colours, legend, new_figure, quiet_fonts, short, to_svg
from robustkit.report.fronts import size
from robustkit.report.tables import attack_labels, display_name, tree_order
from robustkit.results import Curve, Results, VariantResult


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
    quiet_fonts()
    found = {}
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            figure = make(results)
            if figure is not None:
                found[name] = to_svg(figure)
    return found


def tradeoff(results: Results) -> Figure | None:
    """Worst-case against clean accuracy, with intervals, and an arrow from each parent to its child."""
    if not any(row.attacks for row in results.variants):
        return None
    figure, (axes,) = new_figure(8.6, 4.4)
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
    legend(axes, len(looks))
    return figure


def security_curves(results: Results) -> Figure | None:
    """Accuracy against eps with bands; random noise of the same size dashed; the threat's eps as a line.

    Of minimum-norm attacks the whole curve, in steps, as their distances give it.
    """
    if not any(row.curves or row.distances for row in results.variants):
        return None
    figure, (axes,) = new_figure(8.6, 4.2)
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
    legend(axes, len(looks))
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
    figure, (axes,) = new_figure(max(5.0, width), 1.1 + 0.3 * len(rows))
    table = np.ma.masked_invalid(np.array(values, dtype=float))
    axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), [short(name, 16) for name in columns], rotation=35, ha="left")
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
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
    figure, axes = new_figure(10.6, 3.4, 3 if robust else 2)
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
    legend(last, len(looks))
    return figure


def _columns(pairs: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    known = list(pairs)
    return [x for x, _ in known], [y for _, y in known]
