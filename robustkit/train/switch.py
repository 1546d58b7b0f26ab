"""What perturbs in place of a defense that has collapsed: more noise first, then more steps."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.defenses.adversarial import NFgsm, PgdTraining
from robustkit.train.hooks import Defense, is_adversarial
from robustkit.train.state import Named

STEPS = 4
"""Steps of PGD where noise did not help."""
NOISE = 2.0


@dataclass(frozen=True)
class Substitute:
    """A defense whose `perturb` takes the place of another one's; its name is for messages."""

    name: str
    defense: Defense


def substitutes(defenses: Named, norm: str) -> tuple[Substitute, ...]:
    """Return what perturbs after the first collapse, after the second, and so on; nothing under norms they lack.

    n_fgsm with twice the noise of an n_fgsm that collapsed, else its usual noise (linf), then PGD with twice the steps
    that there were. What computes the loss stays.
    """
    owner = next((defense for _, defense in defenses if is_adversarial(defense)), None)
    if owner is None or norm not in ("linf", "l2"):
        return ()
    steps = int(getattr(owner, "steps", 1))
    more = max(STEPS, 2 * steps)
    found = [Substitute(f"pgd_training with {more} steps", PgdTraining(steps=more))]
    if norm == "linf" and steps == 1:
        noise = 2 * owner.noise if isinstance(owner, NFgsm) and owner.noise >= NOISE else NOISE
        found.insert(0, Substitute(f"n_fgsm with noise {noise:g}", NFgsm(noise=noise)))
    return tuple(found)
