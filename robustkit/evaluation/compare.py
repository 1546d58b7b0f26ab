"""Flags that follow from comparing attacks with each other. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.evaluation.lost import lost_examples
from robustkit.results import Audit, Flag, GateResult

Bools = NDArray[np.bool_]
ONE_STEP = frozenset({"fgsm", "torchattacks.FGSM", "torchattacks.FFGSM"})
GRADIENT_FREE = frozenset(
    {"square", "torchattacks.Square", "torchattacks.SPSA", "torchattacks.OnePixel", "torchattacks.Pixle"}
)
NOISE = frozenset({"noise", "torchattacks.GN", "torchattacks.VANILA"})
"""Controls, not attacks."""
FEW_PIXELS = frozenset({"torchattacks.JSMA", "torchattacks.SparseFool"})
"""They keep to no budget: that they fool few examples within eps says nothing about gradients."""
ONE_STEP_SHARE = 0.005
BLACK_BOX_SHARE = 0.002
NOISE_SHARE = 0.002


def compare_flags(correct: Mapping[str, Bools], kinds: Mapping[str, str]) -> list[Flag]:
    """Return the flags of one variant.

    `correct`: per-example correctness by label, with `clean`; `kinds`: the plugin's name by label. Sources: Athalye et
    al. 2018 (arXiv 1802.00420, section 3.1), Carlini et al. 2019 (arXiv 1902.06705, section 3).
    """
    groups: dict[str, dict[str, Bools]] = {}
    for label, values in correct.items():
        if label in kinds:
            groups.setdefault(group_of(kinds[label]), {})[label] = values
    many, one, free = (groups.get(name, {}) for name in ("many", "one", "free"))
    found: list[Flag] = []
    for label, values in groups.get("noise", {}).items():
        found += _noise(label, values, many or one or free)
    for label, values in one.items():
        found += _one_step(label, values, many)
    for label, values in free.items():
        found += _gradient_free(label, values, many)
    if set(groups) == {"noise"}:
        found.append(_only_noise(groups["noise"]))
    return found


def group_of(name: str) -> str:
    """Return what an attack is by its plugin's name: `noise`, `one` step, gradient-`free`, `few` pixels, else `many`.

    What is not known, a user's own attack, counts as many steps: whatever a weaker attack finds, it should find too.
    """
    groups = {"noise": NOISE, "one": ONE_STEP, "free": GRADIENT_FREE, "few": FEW_PIXELS}
    return next((group for group, members in groups.items() if name in members), "many")


def _missed(values: Bools, stronger: Mapping[str, Bools], least: float) -> tuple[int, float] | None:
    """Return how many examples an attack fools that all of `stronger` miss, and their share, if more than `least`."""
    return lost_examples(stats.worst_case(stronger.values()), values, least) if stronger else None


def _noise(label: str, values: Bools, attacks: Mapping[str, Bools]) -> list[Flag]:
    found = _missed(values, attacks, NOISE_SHARE)
    if found is None:
        return []
    missed, share = found
    message = (
        f"random noise ({label}) fools {missed} examples ({share:.1%}) that {_names(attacks)} misses: the attack is "
        "not working on this model; attack with more steps and restarts"
    )
    return [Flag(id="E4", severity="doubt", message=message)]


def _only_noise(controls: Mapping[str, Bools]) -> Flag:
    message = (
        f"only random noise was run ({_names(controls)}), no attack: the worst case says nothing about an adversary; "
        "add pgd"
    )
    return Flag(id="E4", severity="note", message=message)


def _one_step(label: str, values: Bools, many: Mapping[str, Bools]) -> list[Flag]:
    found = _missed(values, many, ONE_STEP_SHARE)
    if found is None:
        return []
    missed, share = found
    single, several = float(values.mean()), float(stats.worst_case(many.values()).mean())
    message = (
        f"one step beats many: {label} leaves {single:.1%}, {_names(many)} {several:.1%}, and {label} alone fools "
        f"{missed} examples ({share:.1%}): gradients are masked or the steps are wrong; use more restarts, a margin "
        "loss, and a gradient-free attack"
    )
    return [Flag(id="E2", severity="wrong" if single < several else "doubt", message=message)]


def _gradient_free(label: str, values: Bools, many: Mapping[str, Bools]) -> list[Flag]:
    found = _missed(values, many, BLACK_BOX_SHARE)
    if found is None:
        return []
    missed, share = found
    message = (
        f"{label} needs no gradient, yet it fools {missed} examples ({share:.1%}) that {_names(many)} misses: the "
        "gradients may be masked; attack with more restarts and other losses"
    )
    return [Flag(id="E3", severity="doubt", message=message)]


def _names(attacks: Mapping[str, Bools]) -> str:
    return ", ".join(attacks)


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


def audit_flags(audit: Audit | None) -> list[Flag]:
    """Return a doubt where AutoAttack broke what the other attacks left."""
    if audit is None or not audit.broken:
        return []
    message = (
        f"{audit}: the attacks of the recipe are too weak for this model; add autoattack to them, or raise the budget "
        "of the cascade"
    )
    return [Flag(id="audit", severity="doubt", message=message)]


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
        needed = stats.examples_needed(gap) if gap else 0
        # Needed is said for sides that disagree on 5 % of the examples; these disagree on more.
        enough = f"at least {needed:,} would" if needed > n else "many more would" if gap else "no number would"
        found.append(
            Flag(
                id="E15",
                severity="doubt",
                message=f"the gate `{gate.text}` is decided by {gap * 100:.2g} points, which {n:,} examples cannot "
                f"resolve ({enough}): raise evaluate.examples or move the line",
            )
        )
    return found
