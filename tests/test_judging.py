"""Verdicts on gates: over seeds, in every seed, on corruptions and on points of security curves."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from robustkit import stats
from robustkit.judging import evaluate_gate
from robustkit.recipe.gates import curve_point, parse_gate
from robustkit.results import Corruptions, Curve, Rate, Results, VariantResult

N = 1000


def rate(value: float) -> Rate:
    return stats.clopper_pearson(round(value * N), N)


def row(name: str, seed: int, worst: float, curve: tuple[float, float] = (0.5, 0.2)) -> VariantResult:
    return VariantResult(
        name=name,
        seed=seed,
        method="",
        clean=rate(0.9),
        worst=rate(worst),
        corruptions=Corruptions(mean=rate(worst + 0.05), by={}),
        curves=[Curve(attack="pgd", norm="linf", eps=[0.1, 8 / 255], rates=[rate(value) for value in curve])],
        per_class={"clean": {}, "worst": {}},
        parameters=1,
        nonzero=1,
        sparsity=0.0,
        bytes=1,
        gzip_bytes=1,
        macs=1,
    )


def results(*rows: VariantResult) -> Results:
    return Results(name="run", threat={"norm": "linf", "eps": 0.1}, classes=["a"], variants=list(rows), provenance={})


def nothing(_variant: str, _seed: int, _metric: str) -> NDArray[np.bool_] | None:
    return None


FOUND = results(
    row("a", 0, 0.6), row("b", 0, 0.3), row("a", 1, 0.6), row("b", 1, 0.3), row("a", 2, 0.3), row("b", 2, 0.5)
)


def test_a_gate_over_seeds_counts_their_mean() -> None:
    found = evaluate_gate(parse_gate("worst(a) >= worst(b) + 5pp"), FOUND, nothing)
    assert found.verdict == "holds"
    assert found.left == pytest.approx(0.5)
    assert found.right == pytest.approx(1.1 / 3 + 0.05)


def test_in_every_seed_one_that_speaks_against_it_decides() -> None:
    found = evaluate_gate(parse_gate("worst(a) >= worst(b)", every_seed=True), FOUND, nothing)
    assert (found.verdict, found.left, found.right) == ("fails", pytest.approx(0.3), pytest.approx(0.5))
    assert found.every_seed
    assert not found.holds


def test_in_every_seed_the_smallest_lead_is_shown_where_all_hold() -> None:
    leading = results(row("a", 0, 0.9), row("b", 0, 0.1), row("a", 1, 0.6), row("b", 1, 0.4))
    found = evaluate_gate(parse_gate("worst(b) < worst(a)", every_seed=True), leading, nothing)
    assert (found.verdict, found.left, found.right) == ("holds", pytest.approx(0.4), pytest.approx(0.6))


def test_a_seed_within_noise_makes_the_gate_within_noise() -> None:
    close = results(row("a", 0, 0.9), row("b", 0, 0.1), row("a", 1, 0.51), row("b", 1, 0.5))
    found = evaluate_gate(parse_gate("worst(a) >= worst(b)", every_seed=True), close, nothing)
    assert found.verdict == "holds (within noise)"


def test_a_seed_that_lacks_the_variant_fails_the_gate() -> None:
    found = evaluate_gate(
        parse_gate("worst(b) >= 0%", every_seed=True), results(row("b", 0, 0.5), row("a", 1, 0.5)), nothing
    )
    assert (found.verdict, found.left) == ("fails", -1.0)


def test_gates_on_corruptions_and_on_points_of_a_curve() -> None:
    alone = results(row("a", 0, 0.4, curve=(0.7, 0.1)))
    assert evaluate_gate(parse_gate("corrupted(a) >= 45%"), alone, nothing).left == pytest.approx(0.45)
    found = evaluate_gate(parse_gate("pgd@0.1(a) >= pgd@8/255(a) + 50pp"), alone, nothing)
    assert (found.left, found.right) == (pytest.approx(0.7), pytest.approx(0.6))
    assert evaluate_gate(parse_gate("pgd@0.3(a) >= 0%"), alone, nothing).verdict == "fails"


def test_points_of_a_curve_are_read_as_numbers() -> None:
    assert curve_point("pgd@8/255") == ("pgd", 8 / 255)
    assert curve_point("pgd@1e-2") == ("pgd", 0.01)
    assert curve_point("pgd") is None
