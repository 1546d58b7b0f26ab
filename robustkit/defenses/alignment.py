"""GradAlign: keep the loss linear within the ball, so that a single step finds what many find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.attacks.threat import Threat
from robustkit.defenses.budget import require_norm, target_of
from robustkit.defenses.inner import random_start
from robustkit.params import NonNegativeFloat
from robustkit.train.hooks import Batch, Defense, Forward, Step
from robustkit.train.modes import evaluating


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each pair (N,) of tensors (N, ...); 1 where one of them is 0, however small they are."""
    scaled = []
    for one in (first.flatten(1), second.flatten(1)):
        largest = one.detach().abs().amax(1, keepdim=True)
        # Of a sure model the gradients are so small that their squares are 0.
        scaled.append(one / torch.where(largest > 0, largest, 1.0))
    known = (first.flatten(1).detach().abs().amax(1) > 0) & (second.flatten(1).detach().abs().amax(1) > 0)
    safe = [torch.where(known[:, None], one, 1.0) for one in scaled]
    return F.cosine_similarity(safe[0], safe[1], dim=1)


def misalignment(model: nn.Module, x: Tensor, target: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return 1 - cos(gradient at x, gradient at a random point of the ball) of each example (N,), with a graph.

    Andriushchenko & Flammarion 2020. x (N, C, H, W) in [0, 1]; target: labels (N,) or soft targets (N, classes). The
    gradients are of the cross-entropy with respect to the image, in eval mode, as an attack sees them; in [0, 2].
    """
    with evaluating(model):
        here = _gradient(model, x, target)
        there = _gradient(model, random_start(x, threat, generator), target)
    return 1 - cosine(here, there)


def _gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    loss = F.cross_entropy(model(leaf).float(), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return gradient


@dataclass(frozen=True)
class GradAlign(Defense):
    """Add amount times the misalignment of input gradients in the ball (Andriushchenko & Flammarion 2020); linf or l2.

    It keeps single-step training (fgsm, fgsm_rs) from catastrophic overfitting. The paper takes 0.2 at eps 8/255 on
    CIFAR-10, and more at larger eps. A step costs two forwards and two backwards more, and the backward of these.
    """

    amount: NonNegativeFloat = 0.2

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the scalar penalty."""
        require_norm("grad_align", step.threat, ("linf", "l2"))
        found = misalignment(step.model, batch.x, target_of(batch), step.threat, step.generator)
        return self.amount * found.mean()
