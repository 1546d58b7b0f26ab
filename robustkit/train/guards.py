"""What can go wrong in training, seen early: rules on what each epoch measured. No training happens here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from robustkit.results import EpochRow

Verdict = Literal["ok", "diverged", "stuck", "collapsed", "rolled-back"]

MAX_ROLLBACKS = 3
MAX_RESTARTS = 2
WARM_SHARE = 0.3
"""Share of a training over which a second new start lets eps grow; a third one trains on clean images before."""
STUCK_LOSS = 0.98
STUCK_MARGIN = 0.02
STUCK_SHARE = 0.20
COLLAPSE_GAP = 0.20
COLLAPSE_JUMP = 0.10
COLLAPSE_DROP = 0.6
COLLAPSE_FROM = 1


@dataclass
class Guards:
    """Judges epochs. The counters are part of a training's state, so that a resume judges alike."""

    classes: int
    epochs: int
    adversarial: bool = True
    """Whether training perturbs its images: only then does a fall of attacked accuracy mean a collapse."""
    rollbacks: int = 0
    restarts: int = 0
    lr_scale: float = 1.0
    switches: int = 0
    """How often another attack has taken the place of one that collapsed."""
    collapsed_at: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, row: EpochRow, earlier: Sequence[EpochRow]) -> Verdict:
        """Return what an epoch shows, given the epochs before it."""
        # The held-out loss shows weights that the epoch's last step has spoilt.
        if not all(math.isfinite(loss) for loss in (row.loss, row.validation_loss) if loss is not None):
            return "diverged"
        if is_stuck(row, earlier, self.classes, self.epochs):
            return "stuck"
        if self.adversarial and has_collapsed(row, earlier):
            return "collapsed"
        return "ok"

    @property
    def max_restarts(self) -> int:
        """How many new starts there are: one more where eps can be held back for longer."""
        return MAX_RESTARTS + self.adversarial

    @property
    def attempt(self) -> int:
        """A number that differs between two trainings of one epoch, so that they draw different numbers."""
        return self.rollbacks + self.restarts + self.switches

    def ramp(self, progress: float) -> float:
        """Return the share of eps that new starts leave to adversarial training at a share of training that is done."""
        held = max(0, self.restarts - 1)
        if not self.adversarial or not held:
            return 1.0
        return min(1.0, max(0.0, progress / WARM_SHARE - (held - 1)))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {
            "rollbacks": self.rollbacks,
            "restarts": self.restarts,
            "lr_scale": self.lr_scale,
            "switches": self.switches,
            "collapsed_at": self.collapsed_at,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the counters."""
        self.rollbacks = int(state["rollbacks"])
        self.restarts = int(state["restarts"])
        self.lr_scale = float(state["lr_scale"])
        self.switches = int(state["switches"])
        self.collapsed_at = state["collapsed_at"]
        self.history = list(state["history"])


def is_stuck(row: EpochRow, earlier: Sequence[EpochRow], classes: int, epochs: int) -> bool:
    """Say whether the model predicts a constant: at chance in the last epoch, or in two in a row after the first
    fifth of training (one alone may be a warm-up over few steps)."""
    if not is_at_chance(row, classes):
        return False
    if row.epoch + 1 == epochs:
        return True
    begun = (row.epoch + 1) / epochs >= STUCK_SHARE
    return begun and bool(earlier) and is_at_chance(earlier[-1], classes)


def is_at_chance(row: EpochRow, classes: int) -> bool:
    """Say whether an epoch's loss and accuracies are those of guessing."""
    chance = 1 / classes
    guessing = row.loss > STUCK_LOSS * math.log(classes)
    return (
        guessing and row.train_accuracy < chance + STUCK_MARGIN and row.clean < chance + max(STUCK_MARGIN, chance / 2)
    )


def has_collapsed(row: EpochRow, earlier: Sequence[EpochRow]) -> bool:
    """Say whether single-step training has collapsed: catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994).

    The multi-step accuracy falls under 0.6 of its best, while the single-step accuracy is 20 points above it or the
    training accuracy has jumped by 10 points in one epoch.
    """
    robust = row.robust
    known = [one.robust for one in earlier if one.robust is not None]
    if robust is None or len(known) < COLLAPSE_FROM:
        return False
    single_step = getattr(row, "single_step", None)
    gap = single_step - robust if single_step is not None else 0.0
    jump = row.train_accuracy - earlier[-1].train_accuracy
    return robust < COLLAPSE_DROP * max(known) and (gap > COLLAPSE_GAP or jump > COLLAPSE_JUMP)
