"""Gates: one comparison each, judged on the results with their intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.errors import UsageError
from robustkit.params import parse_number
from robustkit.results import GateResult, GateVerdict, Rate, Results, VariantResult

ACCURACIES = ("clean", "worst")
POISONED = ("success",)
"""What is measured where the training data are poisoned: the attack success rate."""
SIZES = (
    "latency",
    "bytes",
    "gzip_bytes",
    "parameters",
    "nonzero",
    "macs",
    "activation_bytes",
    "sparsity",
    "train_seconds",
)
_REFERENCE = re.compile(r"([\w.+-]+)\(\s*([\w.+-]+)\s*\)")
_COMPARISON = re.compile(r"^(.+?)(>=|<=|>|<)(.+)$")
_UNITS = {"pp": 0.01, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "ms": 1.0, "s": 1.0}
_TERM = re.compile(r"(?:(?P<factor>[^*]+)\*)?\s*(?P<reference>[\w.+-]+\(\s*[\w.+-]+\s*\))\s*(?P<rest>[+-].+)?")
Correct = Callable[[str, int, str], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Side:
    """factor * metric(variant) + offset; without a metric, the offset alone."""

    metric: str | None
    variant: str | None
    factor: float
    offset: float


@dataclass(frozen=True)
class Gate:
    """One comparison between two sides."""

    text: str
    left: Side
    operator: str
    right: Side
    confident: bool = False

    def references(self) -> list[tuple[str, str]]:
        """Return the (metric, variant) pairs that the gate names."""
        return [
            (side.metric, side.variant) for side in (self.left, self.right) if side.metric and side.variant is not None
        ]


def parse_gate(text: str, confident: bool = False) -> Gate:
    """Return the gate that a text such as `worst(a) >= worst(b) - 2pp` stands for.

    Raises:
        UsageError: it is no comparison of metrics and numbers.
    """
    match = _COMPARISON.match(text.strip())
    if match is None:
        raise UsageError(f"a gate is a comparison such as `clean(baseline) >= 85%`, not {text!r}")
    left, operator, right = match.groups()
    gate = Gate(text.strip(), _side(left), operator, _side(right), confident)
    if not gate.references():
        raise UsageError(f"the gate {text!r} names no variant; write metric(variant), e.g. worst(baseline)")
    _check_shares(gate)
    return gate


def _check_shares(gate: Gate) -> None:
    """Raise a UsageError where a share is compared with more than all: 85 where 85% was meant."""
    for side, other in ((gate.left, gate.right), (gate.right, gate.left)):
        if side.metric is None or (side.metric in SIZES and side.metric != "sparsity") or side.factor != 1.0:
            continue
        reference, unit = f"{side.metric}({side.variant})", "%" if other.metric is None else "pp"
        amounts = (side.offset, other.offset if other.metric is None else 0.0)
        wrong = next((amount for amount in amounts if abs(amount) > 1), None)
        if wrong is not None:
            hint = f"; did you mean {abs(wrong):g}{unit}?" if 1 < abs(wrong) <= 100 else ""
            raise UsageError(f"{reference} is a share in [0, 1], not to be compared with {abs(wrong):g}{hint}")


def _side(text: str) -> Side:
    text = text.strip()
    match = _TERM.fullmatch(text)
    if match is None:
        return Side(None, None, 0.0, _amount(text))
    reference = _REFERENCE.fullmatch(match["reference"])
    assert reference is not None
    factor = _amount(match["factor"]) if match["factor"] else 1.0
    rest = match["rest"]
    offset = _amount(rest[1:]) * (-1 if rest[0] == "-" else 1) if rest else 0.0
    return Side(reference.group(1), reference.group(2), factor, offset)


def _amount(text: str) -> float:
    text = text.strip()
    unit = re.search(r"[A-Za-z]+$", text)
    scale = 1.0
    if unit is not None:
        name = unit.group().lower()
        if name not in _UNITS:
            raise UsageError(
                f"{text!r} in a gate is neither a number nor metric(variant); units: pp, %, kB, MB, GB, ms"
            )
        scale, text = _UNITS[name], text[: unit.start()]
    number = parse_number(text)
    if number is None:
        raise UsageError(f"{text!r} in a gate is neither a number nor metric(variant)")
    return number * scale


def evaluate_gate(gate: Gate, results: Results, correct: Correct) -> GateResult:
    """Judge a gate on results. Several seeds count by their mean; the interval decides what is within noise.

    A gate on something that was not measured (its variant failed, latency was off) fails, with NaN sides.
    """
    left, right = _value(gate.left, results), _value(gate.right, results)
    if math.isnan(left) or math.isnan(right):
        return GateResult(text=gate.text, left=-1.0, right=-1.0, verdict="fails", confident=gate.confident)
    gap = left - right if gate.operator in (">=", ">") else right - left
    holds = gap > 0 if gate.operator in (">", "<") else gap >= -1e-12
    return GateResult(
        text=gate.text,
        left=left,
        right=right,
        verdict=_verdict(holds, abs(gap) < _noise(gate, results, correct)),
        confident=gate.confident,
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
    values = [_metric(row, side.metric) for row in _rows(side.variant, results)]
    return side.factor * float(np.mean(values)) + side.offset if values else math.nan


def _metric(row: VariantResult, metric: str) -> float:
    rate = _rate(row, metric)
    if rate is not None:
        return rate.value
    if metric == "latency":
        return row.latency_ms.get("batch_1", math.nan)
    value: Any = getattr(row, metric, None)
    return float(value) if metric in SIZES and value is not None else math.nan


def _rate(row: VariantResult, metric: str) -> Rate | None:
    if metric == "clean":
        return row.clean
    if metric == "success":
        return row.poisoning.success if row.poisoning else None
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
        rates = [_rate(row, side.metric or "") for row in _rows(side.variant, results)]
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
