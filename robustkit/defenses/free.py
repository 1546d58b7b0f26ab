"""Free adversarial training: the gradient that moves the weights moves the perturbation too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustkit.attacks.projection import l2_direction, project_
from robustkit.attacks.threat import Threat
from robustkit.defenses.budget import require_norm
from robustkit.params import PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step


def free_update(delta: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
    """Return delta (N, C, H, W) after a step of eps along the loss's gradient, back in the ball (Shafahi et al. 2019).

    gradient: of the loss with respect to the perturbed images, shaped like delta; its scale has no effect.
    """
    direction = gradient.sign() if threat.norm == "linf" else l2_direction(gradient)
    return project_(delta + threat.eps_for(delta) * direction, threat)


@dataclass
class FreeTraining(Defense):
    """Take `replay` optimizer steps a batch, each of which moves the perturbation too (Shafahi et al. 2019); linf, l2.

    One backward gives both gradients, so a step costs what a standard one does. The perturbation goes on from batch
    to batch. An epoch costs `replay` standard ones: give train.epochs that much less.
    """

    replay: PositiveInt = 8

    def __post_init__(self) -> None:
        self._delta: Tensor | None = None

    def replays(self) -> int:
        """Return how many optimizer steps each batch takes."""
        return self.replay

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) with the perturbation that the steps before have left, in ball and box."""
        require_norm("free", step.threat, ("linf", "l2"))
        return (batch.x + project_(self._perturbation(batch.x).clone(), step.threat)).clamp(0, 1)

    @contextmanager
    def around_step(self, batch: Batch, forward: Forward, step: Step) -> Iterator[None]:
        """Have the backward compute the images' gradient as well, and follow it."""
        x_adv = batch.x_adv
        if x_adv is None:
            yield
            return
        x_adv.requires_grad_(True)
        yield
        delta = self._perturbation(batch.x)
        if x_adv.grad is not None:
            moved = free_update(delta, x_adv.grad, step.threat)
            # The last batch of an epoch may be smaller: what it does not use waits.
            self._delta = torch.cat([moved, self._delta[len(moved) :]]) if self._delta is not None else moved
        x_adv.requires_grad_(False)
        x_adv.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the perturbation."""
        return {} if self._delta is None else {"delta": self._delta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the perturbation."""
        self._delta = state.get("delta")

    def _perturbation(self, x: Tensor) -> Tensor:
        if self._delta is None or self._delta.shape[1:] != x.shape[1:]:
            self._delta = torch.zeros_like(x)
        kept = self._delta.to(x.device)
        if len(kept) < len(x):
            kept = torch.cat([kept, torch.zeros_like(x[len(kept) :])])
        self._delta = kept
        return kept[: len(x)]
