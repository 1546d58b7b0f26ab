"""Gradient attacks within a ball: FGSM and PGD. Input-only gradients, one forward a step, the best iterate kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.losses import LOSSES, LossName, margin
from robustkit.attacks.projection import l2_norm, project_, random_start
from robustkit.attacks.threat import Threat
from robustkit.params import Fraction, PositiveInt


def ascent_direction(gradient: Tensor, threat: Threat) -> Tensor:
    """Return the unit step that raises a linear loss most: the sign for linf, the direction for l2."""
    return gradient.sign() if threat.norm == "linf" else gradient / l2_norm(gradient)


def within(x: Tensor, adversarial: Tensor, threat: Threat) -> Tensor:
    """Return the adversarial images moved into the ball around x and into [0, 1]."""
    return (x + project_(adversarial - x, threat)).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: LossName = "ce") -> Tensor:
    """Return x after one step of length eps up the loss (Goodfellow et al. 2015, arXiv 1412.6572, section 4).

    x (N, ...) in [0, 1], y (N,). One forward and one backward an example.
    """
    start = x.detach().clone().requires_grad_(True)
    total = LOSSES[loss](model(start).float(), y).sum()
    (gradient,) = torch.autograd.grad(total, start)
    step = ascent_direction(gradient, threat) * threat.eps_for(x)
    return within(x, x + step, threat)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    restarts: int,
    relative_step: float,
    loss: LossName,
    generator: torch.Generator,
    start: bool = True,
) -> Tensor:
    """Return the most adversarial images that projected gradient ascent met (Madry et al. 2018, arXiv 1706.06083).

    x (N, ...) in [0, 1], y (N,); `relative_step`: length of a step as a share of eps; `start`: begin at a random point
    of the ball. A fooled example leaves at once; of the others the iterate with the highest margin comes back. At most
    restarts * (steps + 1) forwards and restarts * steps backwards an example.
    """
    best = x.detach().clone()
    alive = torch.arange(x.shape[0], device=x.device)
    highest = torch.full((x.shape[0],), -torch.inf, device=x.device)
    for _ in range(restarts):
        begin = random_start(x[alive], threat.select(alive), generator) if start else x[alive].clone()
        alive = _ascend(model, x, y, begin, alive, threat, steps, relative_step, loss, best, highest)
        if not len(alive):
            break
    return best


def _ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    adversarial: Tensor,
    alive: Tensor,
    threat: Threat,
    steps: int,
    relative_step: float,
    loss: LossName,
    best: Tensor,
    highest: Tensor,
) -> Tensor:
    """Climb from `adversarial` for the examples at `alive`; fill best and highest; return who is still robust."""
    for step in range(steps + 1):
        last = step == steps
        adversarial = adversarial.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = model(adversarial).float()
            score = LOSSES[loss](logits, y[alive])
        reached = margin(logits.detach(), y[alive])
        _keep_best(adversarial.detach(), reached, alive, best, highest)
        left = survivors(~(reached > 0))
        if last or not len(left):
            return alive[left]
        (gradient,) = torch.autograd.grad(score[left].sum(), adversarial)
        adversarial, gradient, alive = adversarial.detach()[left], gradient[left], alive[left]
        here = threat.select(alive)
        move = ascent_direction(gradient, here) * (here.eps_for(adversarial) * relative_step)
        adversarial = within(x[alive], adversarial + move, here)
    return alive


def _keep_best(found: Tensor, reached: Tensor, alive: Tensor, best: Tensor, highest: Tensor) -> None:
    better = reached > highest[alive]
    shape = (-1, *[1] * (found.dim() - 1))
    best[alive] = torch.where(better.view(shape), found, best[alive])
    highest[alive] = torch.where(better, reached, highest[alive])


@dataclass(frozen=True)
class Fgsm:
    """Fast gradient sign method: one step of length eps (Goodfellow et al. 2015)."""

    loss: Literal["margin", "ce"] = "ce"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the images after one step."""
        return fgsm(model, x, y, threat, loss=self.loss)


@dataclass(frozen=True)
class Pgd:
    """Projected gradient descent with restarts, best iterate, early exit (Madry et al. 2018)."""

    steps: PositiveInt = 20
    restarts: PositiveInt = 1
    loss: Literal["margin", "ce"] = "margin"
    relative_step: Fraction | None = None
    random_start: bool = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the most adversarial images met."""
        return pgd(
            model,
            x,
            y,
            threat,
            steps=self.steps,
            restarts=self.restarts,
            relative_step=self.relative_step or min(1.0, 2.5 / self.steps),
            loss=self.loss,
            generator=generator,
            start=self.random_start,
        )
