"""Gradient attacks within a ball: FGSM and PGD. Input-only gradients, one forward a step, the best iterate kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.losses import LOSSES, LossName, margin, margin_to, wrong_classes
from robustkit.attacks.projection import l2_norm, random_start, within
from robustkit.attacks.threat import Threat
from robustkit.errors import AttackError, UsageError
from robustkit.params import PositiveFloat, PositiveInt

NO_GRADIENT = (
    "the model's output has no gradient with respect to the images (rounding, numpy or .detach() on the way?), so a "
    "gradient attack cannot run; attack by queries, e.g. torchattacks.Square, or attack a differentiable surrogate"
)


def input_gradient(score: Tensor, images: Tensor) -> Tensor:
    """Return the gradient of a score (one number) with respect to the images it was computed from.

    Raises:
        AttackError: the score does not depend on the images through autograd.
    """
    if not score.requires_grad:
        raise AttackError(NO_GRADIENT)
    (gradient,) = torch.autograd.grad(score, images, allow_unused=True)
    if gradient is None:
        raise AttackError(NO_GRADIENT)
    return gradient


def steepest(x: Tensor, gradient: Tensor, threat: Threat, length: Tensor) -> Tensor:
    """Return the change of x (N, ...) that raises a linear loss most; `length` (N, 1, ..., 1) in the threat's norm.

    linf: the sign; l2: the direction, without pixels that are at their bound already; l1: whole pixels, steepest first,
    each as far as [0, 1] lets it go.
    """
    if threat.norm == "linf":
        return gradient.sign() * length
    room = torch.where(gradient > 0, 1 - x, x)
    if threat.norm == "l2":
        free = gradient * (room > 0)
        return free / l2_norm(free) * length
    room = room.flatten(1)
    order = gradient.flatten(1).abs().argsort(1, descending=True)
    sorted_room = room.gather(1, order)
    before = sorted_room.cumsum(1) - sorted_room
    share = torch.minimum((length.flatten(1) - before).clamp_min(0), sorted_room)
    return gradient.sign() * torch.zeros_like(room).scatter(1, order, share).view(x.shape)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: LossName = "ce") -> Tensor:
    """Return x after one step of length eps up the loss (Goodfellow et al. 2015, arXiv 1412.6572, section 4).

    x (N, ...) in [0, 1], y (N,). One forward and one backward an example.

    Raises:
        AttackError: the model's output has no gradient.
    """
    start = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        score = LOSSES[loss](model(start).float(), y).sum()
    gradient = input_gradient(score, start)
    x = x.detach()
    return within(x, x + steepest(x, gradient, threat, threat.eps_for(x)), threat)


def default_step(steps: int) -> float:
    """Return the step as a share of eps: a quarter, or 2.5 / steps where that is more.

    2/255 for eps 8/255 as in Madry et al. 2018 (arXiv 1706.06083, section 5); fewer steps must be able to cross the
    ball. Longer steps than 2.5 / steps cost nothing, since the best iterate is kept.
    """
    return min(1.0, max(0.25, 2.5 / steps))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    alpha: float | None = None,
    relative_step: float | None = None,
    loss: LossName = "margin",
    start: bool = True,
) -> Tensor:
    """Return the most adversarial images that projected gradient ascent met (Madry et al. 2018, arXiv 1706.06083).

    x (N, ...) in [0, 1], y (N,). A step is `alpha` long in the norm's units, or `relative_step` * eps, by default
    `default_step(steps)` * eps. `start`: begin at a random point of the ball. A fooled example leaves at once; of the
    others the iterate with the highest margin comes back. With the margin loss, restarts after the first aim at one
    wrong class each, the likeliest first (Gowal et al. 2019, arXiv 1910.09338): as many restarts as classes try all.
    For l1, Frank-Wolfe steps of at least 2 / (step + 2) are taken (Jaggi 2013, PMLR 28:427).
    At most restarts * (steps + 1) forwards and restarts * steps backwards an example.

    Raises:
        AttackError: the model's output has no gradient.
    """
    share = default_step(steps) if relative_step is None else relative_step
    search = _Search(model, x.detach(), y, threat, loss, alpha, share)
    alive = torch.arange(x.shape[0], device=x.device)
    for restart in range(restarts):
        if not len(alive):
            break
        begin = random_start(search.x[alive], threat.select(alive), generator) if start else search.x[alive]
        alive = search.climb(begin, alive, steps, restart)
    return search.best


class _Search:
    """The images that one PGD run found so far, and how it goes on."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        loss: LossName,
        alpha: float | None,
        relative_step: float,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.loss = loss
        self.classes: Tensor | None = None
        """Each example's wrong classes (N, classes - 1), the likeliest at the first start first."""
        self.alpha, self.relative_step = alpha, relative_step
        self.best = x.clone()
        self.highest = torch.full((x.shape[0],), -torch.inf, device=x.device)

    def climb(self, images: Tensor, alive: Tensor, steps: int, restart: int) -> Tensor:
        """Climb from `images` for the examples at `alive`; return which of them are still robust."""
        for step in range(steps + 1):
            last = step == steps
            images = images.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                logits = self.model(images).float()
            reached = margin(logits.detach(), self.y[alive])
            if self.classes is None:
                self.classes = wrong_classes(logits.detach(), self.y)
            self._keep_best(images.detach(), reached, alive)
            # Not `reached <= 0`: an example whose logits are NaN is not fooled.
            left = survivors(~(reached > 0))
            if last or not len(left):
                return alive[left]
            with torch.enable_grad():
                score = self._score(logits[left], alive[left], restart, self.classes).sum()
            gradient = input_gradient(score, images)[left]
            alive = alive[left]
            images = self._step(images.detach()[left], gradient, alive, step)
        return alive

    def _score(self, logits: Tensor, alive: Tensor, restart: int, classes: Tensor) -> Tensor:
        if restart and self.loss == "margin":
            return margin_to(logits, self.y[alive], classes[alive, (restart - 1) % classes.shape[1]])
        return LOSSES[self.loss](logits, self.y[alive])

    def _step(self, images: Tensor, gradient: Tensor, alive: Tensor, step: int) -> Tensor:
        here = self.threat.select(alive)
        eps = here.eps_for(images)
        length = eps * self.relative_step if self.alpha is None else torch.full_like(eps, self.alpha)
        x = self.x[alive]
        if here.norm == "l1":
            # A sparse step would be thinned out again by the projection; a step towards the best corner stays inside.
            share = (length / eps.clamp_min(1e-12)).clamp(2 / (step + 2), 1)
            return images + share * (x + steepest(x, gradient, here, eps) - images)
        return within(x, images + steepest(images, gradient, here, length), here)

    def _keep_best(self, found: Tensor, reached: Tensor, alive: Tensor) -> None:
        better = reached > self.highest[alive]
        shape = (-1, *[1] * (found.dim() - 1))
        self.best[alive] = torch.where(better.view(shape), found, self.best[alive])
        self.highest[alive] = torch.where(better, reached, self.highest[alive])


@dataclass(frozen=True)
class Fgsm:
    """Fast gradient sign method: one step of length eps (Goodfellow et al. 2015)."""

    seeded_by_example: ClassVar[bool] = True

    loss: Literal["margin", "ce"] = "ce"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the images after one step."""
        return fgsm(model, x, y, threat, loss=self.loss)


@dataclass(frozen=True)
class Pgd:
    """Projected gradient descent with restarts, best iterate, early exit (Madry et al. 2018).

    alpha is the step in the norm's units, relative_step the same as a share of eps; by default `default_step(steps)`.
    """

    seeded_by_example: ClassVar[bool] = True

    steps: PositiveInt = 20
    restarts: PositiveInt = 1
    loss: Literal["margin", "ce"] = "margin"
    alpha: PositiveFloat | None = None
    relative_step: PositiveFloat | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None and self.relative_step is not None:
            raise UsageError("pgd: alpha and relative_step are the same thing in two units; give one of them")
        if self.restarts > 1 and not self.random_start:
            raise UsageError("pgd: restarts need random_start: true, or each one finds the same images")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the most adversarial images met."""
        return pgd(
            model,
            x,
            y,
            threat,
            steps=self.steps,
            restarts=self.restarts,
            alpha=self.alpha,
            relative_step=self.relative_step,
            loss=self.loss,
            generator=generator,
            start=self.random_start,
        )
