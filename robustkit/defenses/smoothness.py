"""Smoothness: penalties on how fast logits and loss change with the image, by double backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import Logits
from robustkit.errors import UsageError
from robustkit.params import NonNegativeFloat, PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step


def jacobian_penalty(model: Logits, x: Tensor, projections: int, generator: torch.Generator) -> Tensor:
    """Return the mean squared Frobenius norm of d logits / d x, estimated, a scalar with a graph (Hoffman et al. 2019).

    Of random unit vectors v among C classes, C * |v J|^2 has the norm as its mean. x: (N, C, H, W).
    """
    leaf = x.detach().requires_grad_(True)
    logits = model(leaf).float()
    total = torch.zeros((), device=x.device)
    for _ in range(projections):
        v = functional.normalize(torch.empty_like(logits).normal_(generator=generator), dim=1)
        (gradient,) = torch.autograd.grad((logits * v).sum(), leaf, create_graph=True)
        total = total + gradient.flatten(1).float().square().sum(1).mean()
    return logits.shape[1] * total / projections


def input_gradients(model: Logits, x: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of each example's cross-entropy with respect to its image, flat (N, D), with a graph.

    target: labels (N,) or soft targets (N, classes).
    """
    leaf = x.detach().requires_grad_(True)
    loss = functional.cross_entropy(model(leaf).float(), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return gradient.flatten(1).float()


def first_order_gain(gradient: Tensor, threat: Threat) -> Tensor:
    """Return eps times the dual norm of each gradient (N, D): what an attack gains, to first order (N,).

    Raises:
        UsageError: the threat's norm has no dual norm.
    """
    duals = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
    if threat.norm not in duals:
        raise UsageError(f"input_gradient needs linf, l2 or l1, and the threat is {threat.norm}: set form: squared")
    dual: Tensor = torch.linalg.vector_norm(gradient, ord=duals[threat.norm], dim=1)
    return threat.eps * dual


@dataclass(frozen=True)
class Jacobian(Defense):
    """Penalise how fast the logits change with the image, by random projections (Hoffman et al. 2019).

    amount / 2 weighs the squared Frobenius norm of the Jacobian, a mean over examples. Each projection costs a
    backward.
    """

    amount: NonNegativeFloat = 0.01
    projections: PositiveInt = 1

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the scalar penalty."""
        return self.amount / 2 * jacobian_penalty(step.model, batch.x, self.projections, step.generator)


@dataclass(frozen=True)
class InputGradient(Defense):
    """Penalise the gradient of the loss with respect to the image (Drucker & LeCun 1992; Ross & Doshi-Velez 2018).

    form dual adds amount * eps * dual norm (Simon-Gabriel et al. 2019), what an attack gains to first order; squared
    adds amount * squared l2 norm. Both are means over the clean images.
    """

    amount: NonNegativeFloat = 1.0
    form: Literal["dual", "squared"] = "dual"

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the scalar penalty."""
        target = batch.y if batch.target is None else batch.target
        gradient = input_gradients(step.model, batch.x, target)
        if self.form == "squared":
            return self.amount * gradient.square().sum(1).mean()
        return self.amount * first_order_gain(gradient, step.threat).mean()
