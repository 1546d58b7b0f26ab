"""What happens after an epoch that is not accepted: undone, started again, or the end of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustkit.errors import TrainingError
from robustkit.results import EpochRow, Flag, Severity
from robustkit.train.guards import MAX_ROLLBACKS, WARM_SHARE, Guards, Verdict
from robustkit.train.state import TrainingState
from robustkit.train.switch import Substitute

Saved = dict[str, Any]


class Recovery:
    """Puts a training back to an earlier state and says so in its flags.

    `put_back`: restores what `snapshot` took; `initial`: the state before the first epoch; `ladder`: what perturbs
    after the first collapse, after the second, and so on.
    """

    def __init__(
        self,
        put_back: Callable[[Saved], None],
        initial: Saved,
        on_event: Callable[[str, Mapping[str, Any]], None],
        ladder: Sequence[Substitute] = (),
    ) -> None:
        self.put_back, self.initial, self.on_event, self.ladder = put_back, initial, on_event, ladder

    def recover(self, verdict: Verdict, row: EpochRow, state: TrainingState, good: Saved) -> bool:
        """Act on a verdict other than "ok" and return whether training is over; `good`: the last accepted state.

        Raises:
            TrainingError: it was undone three times already.
        """
        if verdict == "stuck":
            return self._start_again(row, state)
        if verdict == "collapsed":
            return self._switch(row, state, good)
        return self._undo(verdict, row, state, good)

    def _undo(self, verdict: Verdict, row: EpochRow, state: TrainingState, good: Saved) -> bool:
        which = "validation loss" if math.isfinite(row.loss) else "loss"
        what = f"{which} not finite in epoch {row.epoch + 1}"
        if verdict == "rolled-back":
            what = f"a defense asked to undo epoch {row.epoch + 1}"
        if state.guards.rollbacks >= MAX_ROLLBACKS:
            raise TrainingError(
                f"{what}, after {MAX_ROLLBACKS} returns with half the learning rate each: lower train.optimizer's lr"
            )
        state.guards.rollbacks += 1
        state.guards.lr_scale /= 2
        self.put_back(good)
        self._flag(state, verdict, "note", f"{what}: went back, learning rate halved")
        return False

    def _start_again(self, row: EpochRow, state: TrainingState) -> bool:
        guards = state.guards
        if guards.restarts >= guards.max_restarts:
            self._flag(state, "stuck", "wrong", f"predicts a constant after {guards.restarts} restarts: not trained")
            return True
        guards.restarts += 1
        if guards.restarts <= 1 or not guards.adversarial:
            guards.lr_scale /= 10
        self.put_back(self.initial)
        state.epoch, state.rows, state.best_epoch, state.best_score = 0, [], -1, (-1.0, -1.0)
        state.best, state.last = {}, {}
        message = f"stuck at chance in epoch {row.epoch + 1}: started again with {_remedy(guards)}"
        self._flag(state, "stuck", "note", message)
        return False

    def _switch(self, row: EpochRow, state: TrainingState, good: Saved) -> bool:
        guards = state.guards
        found = (
            f"catastrophic overfitting in epoch {row.epoch + 1} (multi-step {row.robust or 0:.1%}, single-step "
            f"{row.single_step or 0:.1%} on validation)"
        )
        guards.collapsed_at = row.epoch
        self.put_back(good)
        if guards.switches >= len(self.ladder):
            message = f"{found}: training ended with the weights from before; use pgd_training, or a lower eps"
            self._flag(state, "catastrophic-overfitting", "doubt", message)
            return True
        message = f"{found}: went back to the weights from before, and on with {self.ladder[guards.switches].name}"
        guards.switches += 1
        self._flag(state, "catastrophic-overfitting", "doubt", message)
        return False

    def _flag(self, state: TrainingState, kind: str, severity: Severity, message: str) -> None:
        state.flags.append(Flag(id=kind, severity=severity, message=message))
        state.guards.history.append({"kind": kind, "message": message})
        self.on_event("guard", {"guard": kind, "message": message})


def _remedy(guards: Guards) -> str:
    """Return what a new start does otherwise: each one also does what the one before did."""
    rate = "a tenth of the rate"
    if guards.restarts == 1 or not guards.adversarial:
        return rate
    if guards.restarts == 2:
        return f"{rate}, and eps grows over the first {WARM_SHARE:.0%} of the training"
    return f"{rate}: {WARM_SHARE:.0%} of the training on clean images, then eps grows over as much"
