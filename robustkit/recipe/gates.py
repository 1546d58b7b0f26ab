"""Gates as they are written: one comparison each, between metrics of variants and numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustkit.errors import UsageError
from robustkit.params import parse_number

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
CORRUPTED = ("corrupted",)
"""What is measured where images are corrupted: the mean accuracy over all corruptions and severities."""
RESERVED = (*ACCURACIES, *POISONED, *CORRUPTED, *SIZES)
"""Metrics that no attack and no certificate may be labelled as."""
CURVES = ("pgd", "noise")
"""The attacks that draw security curves; `pgd@8/255` is a point of one."""
_REFERENCE = re.compile(r"([\w.+-]+(?:@[\d.e/-]+)?)\(\s*([\w.+-]+)\s*\)")
_COMPARISON = re.compile(r"^(.+?)(>=|<=|>|<)(.+)$")
_UNITS = {"pp": 0.01, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "ms": 1.0, "s": 1.0}
_TERM = re.compile(
    r"(?:(?P<factor>[^*]+)\*)?\s*(?P<reference>[\w.+-]+(?:@[\d.e/-]+)?\(\s*[\w.+-]+\s*\))\s*(?P<rest>[+-].+)?"
)


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
    every_seed: bool = False
    """Whether it must hold under each seed alone; else on the mean over seeds."""

    def references(self) -> list[tuple[str, str]]:
        """Return the (metric, variant) pairs that the gate names."""
        return [
            (side.metric, side.variant) for side in (self.left, self.right) if side.metric and side.variant is not None
        ]


def parse_gate(text: str, confident: bool = False, every_seed: bool = False) -> Gate:
    """Return the gate that a text such as `worst(a) >= worst(b) - 2pp` stands for.

    Raises:
        UsageError: it is no comparison of metrics and numbers.
    """
    match = _COMPARISON.match(text.strip())
    if match is None:
        raise UsageError(f"a gate is a comparison such as `clean(baseline) >= 85%`, not {text!r}")
    left, operator, right = match.groups()
    gate = Gate(text.strip(), _side(left), operator, _side(right), confident, every_seed)
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


def curve_point(metric: str) -> tuple[str, float] | None:
    """Return attack and eps of a metric such as `pgd@8/255`, a point of a security curve; None for any other."""
    attack, at, eps = metric.partition("@")
    number = parse_number(eps) if at else None
    return (attack, number) if number is not None else None
