"""A defense of one's own: keep the loss flat around every training image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustkit import Batch, Defense, Forward, Step


@dataclass(frozen=True)
class InputGradient(Defense):
    """Penalise the dual norm of the loss's gradient with respect to the image (Simon-Gabriel et al. 2019)."""

    weight: float = 1.0

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return weight * eps * mean ||gradient||: what an attack of budget eps gains, to first order."""
        x = batch.x.detach().requires_grad_(True)
        loss = cross_entropy(step.model(x), batch.y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        dual = torch.linalg.vector_norm(gradient.flatten(1), ord=1 if step.threat.norm == "linf" else 2, dim=1)
        gain: Tensor = self.weight * step.threat.eps * dual.mean()
        return gain
