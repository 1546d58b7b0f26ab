"""Fronts of every cost: who is on them, that noise decides nothing, and that the report shows them."""

from __future__ import annotations

import xml.etree.ElementTree as tree
from pathlib import Path

import pytest

from robustkit import stats
from robustkit.report.fronts import front_rows, size
from robustkit.report.pareto import COSTS, front, mark_pareto
from robustkit.report.write import write_report
from robustkit.results import Flag, Latency, Results, VariantResult, read_results, write_results


def row(
    name: str, worst: int, *, seed: int = 0, flags: list[Flag] | None = None, ms: float = 1.0, **costs: int
) -> VariantResult:
    """Costs are 1000 each unless given; the quartiles of a latency are 10 % apart from it."""
    rate = stats.clopper_pearson(worst, 100)
    sizes = {"parameters": 1000, "nonzero": 1000, "bytes": 1000, "gzip_bytes": 1000, "macs": 1000, **costs}
    return VariantResult(
        name=name, seed=seed, clean=stats.clopper_pearson(90, 100), worst=rate, attacks={"pgd": rate},
        latency_ms={"batch_1": ms},
        latency={"batch_1": Latency(median=ms, q1=0.9 * ms, q3=1.1 * ms, p95=2 * ms, runs=50)},
        flags=flags or [], **sizes,
    )  # fmt: skip


def on(results: Results, cost: str) -> list[str]:
    return [one.name for one in results.variants if cost in one.fronts]


ROWS = [
    row("dense", 60, ms=4.0),
    row("sparse", 58, gzip_bytes=100, nonzero=50, ms=4.1),
    row("slim", 55, bytes=300, gzip_bytes=290, macs=250, nonzero=280, ms=1.0),
    row("slimmer", 40, bytes=100, gzip_bytes=95, macs=60, nonzero=90, ms=0.98),
    row("poor", 30, bytes=400, gzip_bytes=400, macs=400, nonzero=400, ms=2.0),
]


def test_each_cost_has_a_front_of_its_own() -> None:
    marked = mark_pareto(Results(variants=ROWS))
    assert on(marked, "bytes") == ["dense", "slim", "slimmer"], "zeros that are stored are on no front of bytes"
    assert on(marked, "macs") == ["dense", "slim", "slimmer"]
    assert on(marked, "gzip_bytes") == ["dense", "sparse", "slimmer"]
    assert on(marked, "nonzero") == ["dense", "sparse"]
    assert [one.pareto for one in marked.variants] == [True, True, False, True, False]
    assert [one.name for one in front(marked.variants, "gzip_bytes")] == ["slimmer", "sparse", "dense"]


def test_latencies_that_cannot_be_told_apart_are_equal() -> None:
    marked = mark_pareto(Results(variants=ROWS))
    # sparse (4.1 ms) and dense (4.0), slimmer (0.98) and slim (1.0) overlap: the more robust of each pair stays.
    assert on(marked, "latency") == ["dense", "slim"]
    quicker = [*ROWS[:3], row("slimmer", 40, ms=0.5), ROWS[4]]
    assert on(mark_pareto(Results(variants=quicker)), "latency") == ["dense", "slim", "slimmer"]
    unmeasured = [one.model_copy(update={"latency_ms": {}, "latency": {}}) for one in ROWS]
    assert on(mark_pareto(Results(variants=unmeasured)), "latency") == []


def test_a_variant_with_a_wrong_flag_is_on_no_front_and_beats_nobody() -> None:
    wrong = row("masked", 99, bytes=1, flags=[Flag(id="P8", severity="wrong", message="nan")])
    marked = mark_pareto(Results(variants=[*ROWS, wrong]))
    assert marked.variants[-1].fronts == []
    assert on(marked, "bytes") == ["dense", "slim", "slimmer"]


def test_seeds_have_fronts_of_their_own() -> None:
    rows = [row("a", 60, seed=0), row("b", 50, seed=0), row("a", 40, seed=1), row("b", 50, seed=1)]
    marked = mark_pareto(Results(variants=rows))
    assert [bool(one.fronts) for one in marked.variants] == [True, False, False, True]
    assert [cells[1] for cells in front_rows(marked)[:2]] == ["a (seed 0)", "b (seed 1)"]


def test_the_chart_rings_and_joins_the_front_of_each_panel() -> None:
    figure = size(mark_pareto(Results(variants=ROWS)))
    assert figure is not None
    panels = {axes.get_xlabel(): axes for axes in figure.axes if axes.get_xlabel()}
    assert list(panels) == [COSTS[cost] for cost in ("bytes", "macs", "latency", "gzip_bytes", "nonzero")]
    *points, joined, rings = panels["bytes of the file"].lines
    assert len(points) == len(ROWS)
    for line in (joined, rings):
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [
            (100, pytest.approx(40)),
            (300, pytest.approx(55)),
            (1000, pytest.approx(60)),
        ]
    slow = [one.model_copy(update={"latency_ms": {}, "latency": {}}) for one in ROWS]
    figure = size(mark_pareto(Results(variants=slow)))
    assert figure is not None
    assert sum(bool(axes.get_xlabel()) for axes in figure.axes) == 4


def test_the_report_lists_the_fronts(tmp_path: Path) -> None:
    evil = ROWS[0].model_copy(update={"name": "<b>", "fronts": ["<i>"]})
    results = mark_pareto(Results(name="r", threat={"norm": "linf", "eps": 0.1}, variants=ROWS))
    write_results(results.model_copy(update={"variants": [*results.variants, evil]}), tmp_path / "results.json")
    assert read_results(tmp_path / "results.json").variants[0].fronts == [
        "bytes",
        "gzip_bytes",
        "nonzero",
        "macs",
        "latency",
    ]
    write_report(tmp_path)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert 'id="fronts"' in html
    assert "<i>" not in html
    assert "| bytes of the file | slimmer | 100 B | 40.0" in markdown
    assert "| MACs | slim | 250 | 55.0" in markdown
    assert tree.parse(tmp_path / "figures" / "size.svg").getroot().tag.endswith("svg")
