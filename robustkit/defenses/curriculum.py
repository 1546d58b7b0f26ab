"""Curricula: weak attacks first, the threat's own eps in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from robustkit.params import Fraction, OpenShare, PositiveInt
from robustkit.train.hooks import Decision, Defense, EpochReport, Step


def grown(progress: float, begin: float, over: float) -> float:
    """Return the share of eps at a share of training that is done: `begin` at first, linear, 1 from `over` on."""
    return 1.0 if progress >= over else begin + (1 - begin) * progress / over


@dataclass
class Curriculum(Defense):
    """Let eps grow from `begin` of it to all of it: a curriculum (after Cai et al. 2018).

    by progress: linear over the first `over` share of training. by accuracy: in `levels` equal steps, one up after an
    epoch whose training accuracy, under the attack of that level, has reached `target`; from `over` on at the full
    eps in any case. It goes with every adversarial training, and no epoch is selected before eps is full.
    """

    by: Literal["progress", "accuracy"] = "progress"
    over: OpenShare = 0.5
    begin: Fraction = 0.0
    levels: PositiveInt = 5
    target: Fraction = 0.5

    def __post_init__(self) -> None:
        self._level = 0

    def ramp(self, step: Step) -> float:
        """Return the share of eps at this step."""
        if self.by == "progress":
            return grown(step.progress, self.begin, self.over)
        return 1.0 if step.progress >= self.over else self._reached()

    def after_epoch(self, report: EpochReport) -> Decision:
        """Go one level up where the accuracy is there."""
        if self.by == "accuracy" and report.train_accuracy >= self.target:
            self._level = min(self._level + 1, self.levels - 1)
        return Decision.CONTINUE

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.over or (self.by == "accuracy" and self._reached() == 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the level."""
        return {"level": self._level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the level."""
        self._level = int(state["level"])

    def _reached(self) -> float:
        """Return the share of eps of the level: the first is above `begin`, the last is 1."""
        share = self.begin + (1 - self.begin) * (self._level + 1) / self.levels
        return 1.0 if math.isclose(share, 1) else share
