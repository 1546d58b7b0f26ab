"""E7: an attack that may change every pixel to anything."""

from __future__ import annotations

from robustkit.attacks.gradient import pgd
from robustkit.attacks.threat import Threat
from robustkit.evaluation.checks.batch import Batch, flag
from robustkit.results import Flag

STEPS = 40
RESTARTS = 2


def unbounded(batch: Batch, classes: int) -> list[Flag]:
    """E7: with the whole pixel range to move in, every classifier must fall to chance."""
    found = pgd(
        batch.model,
        batch.x,
        batch.y,
        Threat("linf", 1.0),
        steps=STEPS,
        restarts=RESTARTS,
        generator=batch.generator(),
    )
    left = float(batch.right(found).float().mean())
    if left <= 1 / classes:
        return []
    message = (
        f"an unbounded attack (linf, eps 1) leaves {left:.0%}, chance is {1 / classes:.0%}: the gradients do not lead "
        "anywhere, so no gradient attack on this model can be believed; use a surrogate or a gradient-free attack"
    )
    return [flag("E7", "wrong", message)]
