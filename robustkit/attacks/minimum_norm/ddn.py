"""DDN: decoupled direction and norm (Rony et al. 2019, arXiv 1811.09600)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.minimum_norm.closest import Closest
from robustkit.attacks.minimum_norm.run import falling, minimise
from robustkit.attacks.projection import l2_direction
from robustkit.attacks.threat import Norm, Threat, checked_norm
from robustkit.params import PositiveInt

GAMMA = 0.05
FIRST_STEP, LAST_STEP = 1.0, 0.01


def ddn(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, steps: int = 100, restarts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): the closest images in l2 to x (N, ...), their direction and length sought apart.

    y (N,). Each step turns the change up the soft margin, which goes where the cross-entropy goes and does not vanish
    on sure models, and sets its length 5 % shorter where it fools the model, else 5 % longer (Rony et al. 2019,
    algorithm 1; here the first length is where the boundary is to first order). A restart costs steps + 21 forwards and
    steps + 1 + min(9, classes - 1) backwards an example, the last stretch (`polish`) among them.

    Raises:
        AttackError: the model's output has no gradient.
    """
    return minimise(partial(_search, steps=steps), model, x, y, "l2", restarts=restarts, generator=generator)


def _search(found: Closest, images: Tensor, *, steps: int) -> None:
    length = found.shortest
    for step in range(steps):
        reached, gradient = found.gradient(images)
        if step == 0:
            # The boundary to first order: a fixed length may lead through a class and out of it again.
            there = -reached / torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            length = torch.where(torch.isinf(length), there, length)
        length = torch.where(reached > 0, length * (1 - GAMMA), length * (1 + GAMMA)).clamp(max=found.largest)
        change = images - found.x + falling(FIRST_STEP, LAST_STEP, step, steps) * l2_direction(gradient)
        images = (found.x + found.wide(length) * l2_direction(change)).clamp(0, 1)
    found.probe(images)


@dataclass(frozen=True)
class Ddn:
    """Decoupled direction and norm: the smallest change that fools, under l2 (Rony et al. 2019)."""

    minimum_norm: ClassVar[bool] = True
    seeded_by_example: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)

    steps: PositiveInt = 100
    restarts: PositiveInt = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the closest images that fool the model, whatever the threat's eps."""
        checked_norm("ddn", threat, self.norms)
        return ddn(model, x, y, generator=generator, steps=self.steps, restarts=self.restarts)[0]
