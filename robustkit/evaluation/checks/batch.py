"""What the checks look at: a few images that the model gets right, and how a flag is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
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

    def right(self, images: Tensor) -> Tensor:
        """Return which of the images (N, ...) the model gives its labels (N,)."""
        with torch.no_grad():
            found: Tensor = self.model(images).argmax(1) == self.y
        return found

    def select(self, index: Tensor) -> Batch:
        """Return the batch of the examples at `index` (n,)."""
        return Batch(self.model, self.x[index], self.y[index], self.threat.select(index), self.seed)


def seed_models(seed: int) -> None:
    """Seed every global generator, so that a model that draws numbers is seen drawing the same ones each time.

    Only inside `undisturbed`, which puts the generators back.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    # Seeding what is not in use yet would be remembered for its first use.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


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
