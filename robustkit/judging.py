"""Verdicts on gates: the two sides as measured, against the interval of their difference. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.recipe.gates import SIZES, Gate, Side, curve_point
from robustkit.results import GateResult, GateVerdict, Rate, Results, VariantResult

Correct = Callable[[str, int, str], NDArray[np.bool_] | None]
"""(variant, seed, metric) -> which examples count for the metric, else None."""
_ORDER: tuple[GateVerdict, ...] = ("fails", "fails (within noise)", "holds (within noise)", "holds")


def evaluate_gate(gate: Gate, results: Results, correct: Correct) -> GateResult:
    """Judge a gate on results. Several seeds count by their mean; with `every_seed` by the one most against it.

    The interval decides what is within noise. A gate on something that was not measured (its variant failed, latency
    was off) fails, with sides of -1.
    """
    if not gate.every_seed:
        return _judge(gate, results, correct)
    seeds = sorted({row.seed for row in results.variants})
    alone = [
        results.model_copy(update={"variants": [row for row in results.variants if row.seed == seed]}) for seed in seeds
    ]
    verdicts = [_judge(gate, one, correct) for one in alone] or [_judge(gate, results, correct)]
    return min(verdicts, key=lambda one: (_ORDER.index(one.verdict), _gap(gate, one.left, one.right)))


def _gap(gate: Gate, left: float, right: float) -> float:
    return left - right if gate.operator in (">=", ">") else right - left


def _judge(gate: Gate, results: Results, correct: Correct) -> GateResult:
    left, right = _value(gate.left, results), _value(gate.right, results)
    if math.isnan(left) or math.isnan(right):
        return unmeasured(gate)
    gap = _gap(gate, left, right)
    holds = gap > 0 if gate.operator in (">", "<") else gap >= -1e-12
    return GateResult(
        text=gate.text,
        left=left,
        right=right,
        verdict=_verdict(holds, abs(gap) < _noise(gate, results, correct)),
        confident=gate.confident,
        every_seed=gate.every_seed,
    )


def unmeasured(gate: Gate) -> GateResult:
    """Return the verdict on a gate whose sides were not measured."""
    return GateResult(
        text=gate.text, left=-1.0, right=-1.0, verdict="fails", confident=gate.confident, every_seed=gate.every_seed
    )


def _verdict(holds: bool, noise: bool) -> GateVerdict:
    if holds:
        return "holds (within noise)" if noise else "holds"
    return "fails (within noise)" if noise else "fails"


def _rows(variant: str | None, results: Results) -> list[VariantResult]:
    return [row for row in results.variants if row.name == variant]


def _value(side: Side, results: Results) -> float:
    if side.metric is None:
        return side.offset
    values = [metric_of(row, side.metric) for row in _rows(side.variant, results)]
    return side.factor * float(np.mean(values)) + side.offset if values else math.nan


def metric_of(row: VariantResult, metric: str) -> float:
    """Return a variant's value of a metric of gates: a share of 1, or a size in its unit; NaN where not measured."""
    rate = rate_of(row, metric)
    if rate is not None:
        return rate.value
    if metric == "latency":
        return row.latency_ms.get("batch_1", math.nan)
    value: Any = getattr(row, metric, None)
    return float(value) if metric in SIZES and value is not None else math.nan


def rate_of(row: VariantResult, metric: str) -> Rate | None:
    """Return an accuracy or a success rate with its interval; None for sizes, and where it was not measured."""
    if metric == "clean":
        return row.clean
    if metric == "success":
        return row.poisoning.success if row.poisoning else None
    if metric == "corrupted":
        return row.corruptions.mean if row.corruptions else None
    point = curve_point(metric)
    if point is not None:
        return _on_curve(row, *point)
    return row.worst if metric == "worst" else row.attacks.get(metric) or row.certified.get(metric)


def _noise(gate: Gate, results: Results, correct: Correct) -> float:
    """Return the half-width of the 95 % interval of left - right: paired where both sides are accuracies."""
    sides = [side for side in (gate.left, gate.right) if side.metric]
    if len(sides) == 2 and all(side.factor == 1.0 for side in sides):
        paired = _paired_noise(sides[0], sides[1], results, correct)
        if paired is not None:
            return paired
    widths = []
    for side in sides:
        rates = [rate_of(row, side.metric or "") for row in _rows(side.variant, results)]
        spans = [(rate.high - rate.low) / 2 for rate in rates if rate is not None]
        widths.append(side.factor * float(np.mean(spans)) if spans else 0.0)
    return math.sqrt(sum(width * width for width in widths))


def _paired_noise(left: Side, right: Side, results: Results, correct: Correct) -> float | None:
    widths = []
    for row in _rows(left.variant, results):
        first = correct(left.variant or "", row.seed, left.metric or "")
        second = correct(right.variant or "", row.seed, right.metric or "")
        if first is None or second is None or first.shape != second.shape:
            return None
        paired = stats.paired(second, first)
        widths.append((paired.high - paired.low) / 2)
    return float(np.mean(widths)) if widths else None


def _on_curve(row: VariantResult, attack: str, eps: float) -> Rate | None:
    """Return the accuracy that the security curve of an attack has at eps."""
    curves = (curve for curve in row.curves if curve.attack == attack)
    return next((curve.rates[curve.eps.index(eps)] for curve in curves if eps in curve.eps), None)
