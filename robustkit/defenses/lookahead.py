"""Lookahead: slow weights that follow the optimizer's fast ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustkit.defenses.averaging import move_
from robustkit.params import Fraction, PositiveInt
from robustkit.train.hooks import Batch, Defense, Step


class Lookahead(Defense):
    """Every k steps move slow weights a share alpha towards the fast ones, and go on from there (Zhang et al. 2019).

    The optimizer's momentum is kept. Evaluated is the model as it is, at most k - 1 steps ahead of the slow weights.
    """

    def __init__(self, k: PositiveInt = 5, alpha: Fraction = 0.5) -> None:
        self.k = k
        self.alpha = alpha
        self._slow: dict[str, Tensor] = {}
        self._steps = 0

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Take the first weights as slow ones, before the first step."""
        if not self._slow:
            self._slow = {name: value.clone() for name, value in _weights(step.model).items()}
        return batch

    def after_step(self, step: Step) -> None:
        """Move the slow weights when k steps are over, and put them into the model."""
        self._steps += 1
        if self._steps % self.k or not self._slow:
            return
        # Frozen layers stay where they are: their slow weights wait.
        weights = _weights(step.model, frozen=False)
        move_(self._slow, weights, self.alpha)
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(self._slow[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights and how many steps were taken."""
        return {"slow": dict(self._slow), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""
        self._slow, self._steps = dict(state["slow"]), int(state["steps"])


def _weights(model: nn.Module, *, frozen: bool = True) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.named_parameters() if frozen or one.requires_grad}
