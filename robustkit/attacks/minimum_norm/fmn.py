"""FMN: the fast minimum-norm attack (Pintor et al. 2021, arXiv 2102.12827)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.minimum_norm.closest import Closest
from robustkit.attacks.minimum_norm.run import falling, minimise
from robustkit.attacks.projection import distances, l2_direction, within
from robustkit.attacks.threat import Norm, Threat, checked_norm
from robustkit.params import PositiveFloat, PositiveInt

GAMMA, LAST_GAMMA = 0.05, 1e-4
"""By how much the ball grows and shrinks, at first and at last (section 3)."""
LAST_STEP = 0.01
"""The last step as a share of the first."""


def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    *,
    generator: torch.Generator,
    steps: int = 100,
    alpha: float = 10.0,
    restarts: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): the closest images to x (N, ...) found in a ball that closes in on the boundary.

    y (N,); norm linf, l2 or l1. Each step goes up the soft margin, `alpha` long in the Euclidean norm at first, and is
    projected onto a ball that shrinks while the image fools the model and grows while it does not (Pintor et al. 2021,
    algorithm 1), here onto ball and box at once. A restart costs steps + 21 forwards and
    steps + 1 + min(9, classes - 1) backwards an example, the last stretch (`polish`) among them.

    Raises:
        AttackError: the model's output has no gradient.
    """
    search = partial(_search, steps=steps, alpha=alpha)
    return minimise(search, model, x, y, norm, restarts=restarts, generator=generator)


def _search(found: Closest, images: Tensor, *, steps: int, alpha: float) -> None:
    ball = Threat(found.norm, 0.0)
    eps = torch.full_like(found.shortest, torch.inf)
    for step in range(steps):
        reached, gradient = found.gradient(images)
        gamma = falling(GAMMA, LAST_GAMMA, step, steps)
        # Until something was found, the ball ends a little beyond the boundary to first order: at it, nothing would be.
        there = distances(images - found.x, found.norm) - reached / found.slope(gradient)
        larger = torch.where(torch.isinf(found.shortest), there * (1 + GAMMA), eps * (1 + gamma))
        smaller = torch.minimum(eps * (1 - gamma), found.shortest)
        eps = torch.where(reached > 0, smaller, larger).clamp(max=found.largest)
        ascent = falling(alpha, LAST_STEP * alpha, step, steps) * l2_direction(gradient)
        images = within(found.x, images + ascent, ball.with_eps(eps))
    found.probe(images)


@dataclass(frozen=True)
class Fmn:
    """Fast minimum-norm attack: the smallest change that fools, under linf, l2 or l1 (Pintor et al. 2021)."""

    minimum_norm: ClassVar[bool] = True
    seeded_by_example: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")

    steps: PositiveInt = 100
    alpha: PositiveFloat = 10.0
    restarts: PositiveInt = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the closest images that fool the model, whatever the threat's eps."""
        norm = checked_norm("fmn", threat, self.norms)
        return fmn(model, x, y, norm, generator=generator, steps=self.steps, alpha=self.alpha, restarts=self.restarts)[
            0
        ]
