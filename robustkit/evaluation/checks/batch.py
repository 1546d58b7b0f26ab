"""What the checks look at: a few images that the model gets right, and how a flag is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.results import Flag, Severity

EXAMPLES = 64


@dataclass(frozen=True)
class Batch:
    """Images x (N, ...) in [0, 1] that the model gets right, their labels y (N,), and the budget of each."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Threat
    seed: int

    def generator(self) -> torch.Generator:
        """Return a generator at the start of the seed's numbers: no check shifts those of another."""
        return torch.Generator(device=self.x.device).manual_seed(self.seed)

    def select(self, index: Tensor) -> Batch:
        """Return the batch of the examples at `index` (n,)."""
        return Batch(self.model, self.x[index], self.y[index], self.threat.select(index), self.seed)


def flag(kind: str, severity: Severity, message: str) -> Flag:
    """Return a flag."""
    return Flag(id=kind, severity=severity, message=message)


def input_gradients(batch: Batch, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Return the gradient of a loss at images x (N, ...), shaped like them; None where autograd leads nowhere.

    The loss is that of the outputs as the model gives them, not of logits made of them: what saturates is to be seen.
    """
    start = x.clone().requires_grad_(True)
    logits = batch.model(start).float()
    if not logits.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss(logits, batch.y).sum(), start, allow_unused=True)
    return gradient
