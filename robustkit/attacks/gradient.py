"""Gradient attacks within a ball: FGSM and PGD. Input-only gradients, one forward a step, the best iterate kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.losses import LOSSES, LossName, as_logits, margin_to
from robustkit.attacks.projection import random_start, within
from robustkit.attacks.search import Search, input_gradient, steepest
from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError
from robustkit.params import PositiveFloat, PositiveInt


def fgsm(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, loss: LossName = "ce") -> Tensor:
    """Return x after one step of length eps up the loss (Goodfellow et al. 2015, arXiv 1412.6572, section 4).

    x (N, ...) in [0, 1], y (N,). One forward and one backward an example.

    Raises:
        AttackError: the model's output has no gradient.
    """
    start = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        score = LOSSES[loss](as_logits(model(start).float()), y).sum()
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
    search = Search(model, x, y, threat)
    eps = threat.eps_for(search.x).flatten()
    share = default_step(steps) if relative_step is None else relative_step
    lengths = [eps * share if alpha is None else torch.full_like(eps, alpha)] * steps
    alive = search.everyone
    for restart in range(restarts):
        if not len(alive):
            break
        begin = random_start(search.x[alive], threat.select(alive), generator) if start else search.x[alive]
        aimed = restart - 1 if restart and loss == "margin" else None
        alive = search.climb(begin, alive, _Score(search, loss, aimed), lengths)
    return search.best


@dataclass(frozen=True)
class _Score:
    """What a restart climbs: its loss, or the margin to each example's `aimed`-th likeliest wrong class."""

    search: Search
    loss: LossName
    aimed: int | None

    def __call__(self, logits: Tensor, alive: Tensor, number: int) -> Tensor:
        y = self.search.y[alive]
        if self.aimed is None:
            return LOSSES[self.loss](logits, y)
        classes = self.search.classes[alive]
        return margin_to(logits, y, classes[:, self.aimed % classes.shape[1]])


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
