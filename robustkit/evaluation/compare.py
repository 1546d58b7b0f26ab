"""Flags that follow from comparing attacks with each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.results import Flag, GateResult

Bools = NDArray[np.bool_]
MULTI_STEP = frozenset({"pgd", "cascade", "autoattack", "torchattacks.PGD", "torchattacks.PGDL2", "torchattacks.APGD"})
ONE_STEP = frozenset({"fgsm", "torchattacks.FGSM", "torchattacks.FFGSM"})
GRADIENT_FREE = frozenset({"torchattacks.Square", "torchattacks.SPSA", "torchattacks.OnePixel", "torchattacks.Pixle"})
NOISE = frozenset({"noise", "torchattacks.GN"})
ONE_STEP_SHARE = 0.005
BLACK_BOX_SHARE = 0.002
NOISE_SHARE = 0.002
LEAST_EXAMPLES = 2
"""One example that slips through is chance, not masking."""


def compare_flags(correct: Mapping[str, Bools], kinds: Mapping[str, str]) -> list[Flag]:
    """Return the flags of one variant.

    `correct`: per-example correctness by label, with `clean`; `kinds`: the plugin's name by label. Sources: Athalye et
    al. 2018 (arXiv 1802.00420, section 3.1), Carlini et al. 2019 (arXiv 1902.06705, section 3).
    """
    by_kind = {label: values for label, values in correct.items() if label in kinds}
    iterative = {label: values for label, values in by_kind.items() if kinds[label] in MULTI_STEP}
    if not iterative:
        return []
    strong = stats.worst_case(iterative.values())
    names = ", ".join(iterative)
    found: list[Flag] = []
    for label, values in by_kind.items():
        missed = int(np.count_nonzero(strong & ~values))
        if missed < LEAST_EXAMPLES:
            continue
        share = missed / max(1, values.size)
        if kinds[label] in ONE_STEP:
            found += _one_step(label, names, values, strong, missed, share)
        elif kinds[label] in GRADIENT_FREE and share > BLACK_BOX_SHARE:
            found.append(
                Flag(
                    id="E3",
                    severity="doubt",
                    message=f"{label} needs no gradient, yet it fools {missed} examples ({share:.1%}) that {names} "
                    "misses: the gradients may be masked; attack with more restarts and other losses",
                )
            )
        elif kinds[label] in NOISE and share > NOISE_SHARE:
            found.append(
                Flag(
                    id="E4",
                    severity="doubt",
                    message=f"random noise ({label}) fools {missed} examples ({share:.1%}) that {names} misses: "
                    "the attack is not working on this model; attack with more steps and restarts",
                )
            )
    return found


def budget_flags(projected: Mapping[str, int]) -> list[Flag]:
    """Return a note for each attack (by label) with results that left the ball or the box."""
    return [
        Flag(
            id="E1",
            severity="note",
            message=f"{label}: {count} results left the ball or the box, or were not finite, and did not count; an "
            "attack that is made for this norm and eps would be stronger",
        )
        for label, count in projected.items()
        if count
    ]


def finite_flags(not_finite: Mapping[str, int]) -> list[Flag]:
    """Return what logits that are not finite do to the figures; `not_finite`: examples by label, with `clean`."""
    found = []
    for label, count in not_finite.items():
        if not count:
            continue
        if label == "clean":
            message = f"logits of {count:,} test images are not finite and count as wrong: retrain the model"
        else:
            message = (
                f"{label}: logits of {count:,} attacked images are not finite, which does not count as fooled; the "
                "accuracy under this attack may be lower: look for what overflows in the model"
            )
        found.append(Flag(id="P8", severity="wrong" if label == "clean" else "doubt", message=message))
    return found


def subset_flags(gates: Iterable[GateResult], n: int) -> list[Flag]:
    """Return a doubt for each gate that n examples cannot decide: its two sides differ by less than the noise."""
    found = []
    for gate in gates:
        if "within noise" not in gate.verdict:
            continue
        gap = abs(gate.left - gate.right)
        enough = f"at least {stats.examples_needed(gap):,} would" if gap else "no number would"
        found.append(
            Flag(
                id="E15",
                severity="doubt",
                message=f"the gate `{gate.text}` is decided by {gap * 100:.2g} points, which {n:,} examples cannot "
                f"resolve ({enough}): raise evaluate.examples or move the line",
            )
        )
    return found


def _one_step(label: str, names: str, values: Bools, strong: Bools, missed: int, share: float) -> list[Flag]:
    single, many = float(values.mean()), float(strong.mean())
    if share <= ONE_STEP_SHARE:
        return []
    stronger = single < many
    return [
        Flag(
            id="E2",
            severity="wrong" if stronger else "doubt",
            message=f"one step beats many: {label} leaves {single:.1%}, {names} {many:.1%}, and {label} alone fools "
            f"{missed} examples ({share:.1%}): gradients are masked or the steps are wrong; use more restarts, a "
            "margin loss, and a gradient-free attack",
        )
    ]
