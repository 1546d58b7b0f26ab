"""What it means where one attack finds what another misses, example by example. Imports no torch.

`correct` arrays are (N,): which examples are still right. After Carlini et al. 2019 (arXiv 1902.06705, section 3),
Athalye et al. 2018 (arXiv 1802.00420, section 3.1) and Pintor et al. 2022 (arXiv 2106.09947).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.evaluation.lost import LEAST, lost_examples
from robustkit.results import Flag, Severity

Bools = NDArray[np.bool_]
TRANSFER = 0.002
TRANSFER_WRONG = 0.05
RISE = 0.005
CONVERGED = 0.005
FAR_FROM_CONVERGED = 0.05
SILENT = 0.002
LOSSES_APART = 0.03
SIGNIFICANT = 0.05
COLLAPSED = 0.20


def _doubt_or_note(share: float) -> Severity:
    """Say how much is made of a share of examples that more of the same attack finds."""
    return "doubt" if share > FAR_FROM_CONVERGED else "note"


def transfer_flags(white_box: Bools, transferred: Bools, *, compressed: bool) -> list[Flag]:
    """E5, and E17 where the surrogate is what a model was compressed from: images of a surrogate that fool the model.

    `white_box`: right under the attacks on the model itself; `transferred`: right under the surrogate's images.
    """
    found = lost_examples(white_box, transferred, TRANSFER)
    if found is None:
        return []
    lost, share = found
    severity: Severity = "wrong" if share > TRANSFER_WRONG else "doubt"
    if compressed:
        message = (
            f"adversarial images of the model that this was compressed from fool {lost} examples ({share:.1%}) that "
            "attacks on it miss: compression masks gradients; attack the parent and try its images here, or train on"
        )
        return [Flag(id="E17", severity=severity, message=message)]
    message = (
        f"adversarial images of another model fool {lost} examples ({share:.1%}) that attacks on this one miss: its "
        "gradients are masked; attack a surrogate and count its images too"
    )
    return [Flag(id="E5", severity=severity, message=message)]


def monotone_flags(eps: Sequence[float], correct: Sequence[Bools]) -> list[Flag]:
    """E6: attacks of the same kind, each on its own, at growing eps; accuracy must not rise."""
    found = []
    for number in range(1, len(eps)):
        before, after = correct[number - 1], correct[number]
        rise = int(after.sum()) - int(before.sum())
        share = rise / max(1, after.size)
        if rise < LEAST or share <= RISE:
            continue
        message = (
            f"accuracy rises by {share:.1%} from {eps[number - 1]:.4g} to {eps[number]:.4g} times eps: the attack gets "
            "lost, not stopped; use more steps and restarts, and start from what a smaller eps found"
        )
        found.append(Flag(id="E6", severity="doubt", message=message))
    return found


def convergence_flags(before: Bools, doubled: Bools, steps: int) -> list[Flag]:
    """E8: the same attack with twice its steps."""
    found = lost_examples(before, doubled, CONVERGED)
    if found is None:
        return []
    lost, share = found
    message = (
        f"pgd with {2 * steps} steps fools {lost} examples ({share:.1%}) more than with {steps}: it has not converged; "
        "use more steps, or cascade"
    )
    return [Flag(id="E8", severity=_doubt_or_note(share), message=message)]


def silent_flags(silent: Mapping[str, int], n: int) -> list[Flag]:
    """E9: examples that an attack (by label) had fooled on its way, and was not fooling where it ended."""
    found = []
    for label, count in silent.items():
        if count >= LEAST and count / max(1, n) > SILENT:
            message = (
                f"{label} met adversarial images of {count} examples ({count / n:.1%}) and gave others back: its "
                "accuracy is too high by that much; use an attack that keeps the best, such as pgd or cascade"
            )
            found.append(Flag(id="E9", severity="doubt", message=message))
    return found


def restart_flags(before: Bools, after: Bools) -> list[Flag]:
    """E10: one more random start, tried on what is left."""
    left = int(before.sum())
    lost = int(np.count_nonzero(before & ~after))
    if lost < LEAST or lost / max(1, left) <= CONVERGED:
        return []
    message = (
        f"one more random start fools {lost} of {left} examples that were left: more starts would find more; raise "
        "restarts, or use cascade"
    )
    return [Flag(id="E10", severity=_doubt_or_note(lost / before.size), message=message)]


def loss_flags(cross_entropy: Bools, margin: Bools) -> list[Flag]:
    """E11: the same attack up two losses (Croce & Hein 2020, arXiv 2003.01690, section 4)."""
    difference = stats.paired(margin, cross_entropy)
    if abs(difference.difference) <= LOSSES_APART or difference.p >= SIGNIFICANT:
        return []
    better, worse = ("margin", "cross-entropy") if difference.difference > 0 else ("cross-entropy", "margin")
    message = (
        f"pgd on {worse} leaves {abs(difference.difference):.1%} more examples than on the {better} (p = "
        f"{difference.p:.2g}): one loss hides what the other finds; attack with both, or with cascade"
    )
    return [Flag(id="E11", severity="doubt", message=message)]


def collapse_flags(one_step: Bools, ten_steps: Bools, *, trained_by_one_step: bool) -> list[Flag]:
    """E12: robust against one step alone. Of a model trained by one step, catastrophic overfitting (Wong et al. 2020,
    arXiv 2001.03994, section 4); of any other, what a single step cannot see."""
    gap = float(one_step.mean()) - float(ten_steps.mean()) if one_step.size else 0.0
    if gap <= COLLAPSED:
        return []
    seen = f"one step leaves {one_step.mean():.0%}, ten steps leave {ten_steps.mean():.0%}"
    if trained_by_one_step:
        message = (
            f"{seen}: training by single steps has collapsed (catastrophic overfitting); quote no single-step figure, "
            "and train again with guards: true or pgd_training"
        )
        return [Flag(id="E12", severity="wrong", message=message)]
    return [Flag(id="E12", severity="note", message=f"{seen}: quote no single-step figure of this model")]
