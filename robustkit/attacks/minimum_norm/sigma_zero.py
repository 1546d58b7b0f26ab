"""Sigma-zero: gradient descent on a smooth count of the values that change (Cina et al. 2024, arXiv 2402.01879)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.minimum_norm.closest import Closest
from robustkit.attacks.minimum_norm.run import falling, minimise
from robustkit.attacks.threat import Norm, Threat, checked_norm
from robustkit.params import PositiveInt

SIGMA = 1e-3
"""The smooth count of a value v is v^2 / (v^2 + sigma)."""
THRESHOLD = 0.3
"""Values below the threshold are put back; this is the first one, each example has its own."""
ADJUSTMENT = 0.01
FIRST_STEP = 1.0


def sigma_zero(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, steps: int = 300, restarts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): images that differ from x (N, ...) in the fewest values found, and in how many.

    y (N,). A value is one channel of one pixel, as in the paper. Each step descends the margin and a smooth count of
    the values that change, then puts back the smallest changes; the threshold rises while the model is fooled, else it
    falls (Cina et al. 2024, algorithm 1). A restart costs steps + 3 + 3 b forwards and steps + 1 + min(9, classes - 1)
    backwards an example, b the bits of the number of values, the last stretch (`polish`) among them.

    Raises:
        AttackError: the model's output has no gradient.
    """
    return minimise(partial(_search, steps=steps), model, x, y, "l0", restarts=restarts, generator=generator)


def _search(found: Closest, images: Tensor, *, steps: int) -> None:
    threshold = torch.full_like(found.shortest, THRESHOLD)
    values = max(1, found.x[:1].numel())
    for step in range(steps):
        reached, ascent = found.gradient(images)
        fooled, change = reached > 0, images - found.x
        size = falling(FIRST_STEP, 0.0, step, steps)
        threshold = (threshold + torch.where(fooled, ADJUSTMENT, -ADJUSTMENT) * size).clamp(0, 1)
        count = 2 * SIGMA * change / (change.square() + SIGMA).square() / values
        # The margin is a hinge: where the model is fooled, only the count is left to go down.
        descent = count - torch.where(found.wide(fooled), 0.0, ascent)
        peak = descent.flatten(1).abs().amax(1).clamp_min(torch.finfo(descent.dtype).tiny)
        change = (images - size * descent / found.wide(peak)).clamp(0, 1) - found.x
        images = torch.where(change.abs() >= found.wide(threshold), found.x + change, found.x).clamp(0, 1)
    found.probe(images)


@dataclass(frozen=True)
class SigmaZero:
    """Sigma-zero: the fewest changed values that fool, under l0 (Cina et al. 2024)."""

    minimum_norm: ClassVar[bool] = True
    seeded_by_example: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)

    steps: PositiveInt = 300
    restarts: PositiveInt = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the images with the fewest changed values that fool the model, whatever the threat's eps."""
        checked_norm("sigma_zero", threat, self.norms)
        return sigma_zero(model, x, y, generator=generator, steps=self.steps, restarts=self.restarts)[0]
