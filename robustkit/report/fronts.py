"""Robustness against what it costs: a chart with a panel a cost, and the fronts as a table."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from robustkit.report.drawing import colours, short
from robustkit.report.pareto import COSTS, LATENCY, cost_of, front
from robustkit.report.tables import count_text, display_name, rate_text, size_text
from robustkit.results import Results, VariantResult

PANELS = ("bytes", "macs", "latency", "gzip_bytes", "nonzero")
COLUMNS = 3
FRONT_HEAD = ("cost", "variant", "what it costs", "worst case", "clean")
FRONT_NOTE = (
    "Of each cost the variants that no other one beats in both it and the worst case, the cheapest first. Latencies "
    "whose quartiles overlap count as equal; a variant with a wrong flag is on no front."
)


def size(results: Results) -> Figure | None:
    """Worst-case accuracy against five costs; the front of each is ringed and joined."""
    panels = [cost for cost in PANELS if any(cost_of(row, cost) is not None for row in results.variants)]
    if not panels or not any(row.attacks for row in results.variants):
        return None
    looks = colours(results)
    columns = 1 if len(looks) <= 18 else 2
    height = max(6.4, 3.2 + 0.19 * len(looks) / columns)
    figure = Figure(figsize=(11.5, height), layout="constrained")
    places = list(figure.subplots(2, COLUMNS).flat)
    for axes, cost in zip(places, panels, strict=False):
        _panel(axes, results, cost, looks)
    for axes in places[::COLUMNS]:
        axes.set_ylabel("worst case (%)")
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    names = [short(label, 26) for label in unique]
    places[-1].legend(unique.values(), names, loc="upper left", frameon=False, fontsize=9 - columns, ncols=columns)
    return figure


def _panel(axes: Axes, results: Results, cost: str, looks: dict[str, tuple[str, str]]) -> None:
    for row in results.variants:
        value = cost_of(row, cost)
        if value is not None:
            colour, marker = looks[row.name]
            axes.plot(value, 100 * row.worst.value, marker, color=colour, ms=6, label=row.name, zorder=3)
    for seed in dict.fromkeys(row.seed for row in results.variants):
        chosen = front([row for row in results.variants if row.seed == seed], cost)
        x, y = [cost_of(row, cost) or 0.0 for row in chosen], [100 * row.worst.value for row in chosen]
        axes.step(x, y, where="post", color="black", lw=0.9, alpha=0.5, zorder=1)
        axes.plot(x, y, "o", mfc="none", mec="black", ms=11, mew=1, zorder=2)
    axes.set_xlabel(COSTS[cost])
    _scale(axes, [value for row in results.variants if (value := cost_of(row, cost))])


def _scale(axes: Axes, values: list[float]) -> None:
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


def front_rows(results: Results) -> list[list[str]]:
    """Return a row for each cost and variant on its front, seed after seed; none without an attack."""
    if not any(row.attacks for row in results.variants):
        return []
    return [
        [COSTS[cost], display_name(row, results), _cost_text(row, cost), rate_text(row.worst), rate_text(row.clean)]
        for cost in PANELS
        for seed in dict.fromkeys(row.seed for row in results.variants)
        for row in front([one for one in results.variants if one.seed == seed], cost)
    ]


def _cost_text(row: VariantResult, cost: str) -> str:
    value = cost_of(row, cost) or 0.0
    if cost == LATENCY:
        return f"{value:.3g} ms"
    return size_text(value) if "bytes" in cost else count_text(value)
