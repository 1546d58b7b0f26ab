"""PDPGD: primal-dual proximal gradient descent (Matyasko & Chau 2021, arXiv 2106.01538)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.minimum_norm.closest import Closest
from robustkit.attacks.minimum_norm.run import falling, minimise
from robustkit.attacks.projection import distances, l2_norm, onto_l1_ball
from robustkit.attacks.threat import Norm, Threat, checked_norm
from robustkit.params import PositiveInt

FIRST_STEP, LAST_STEP = 0.3, 0.001
"""Steps of the change, in the units of a pixel value (linf, l1) or of the norm (l2)."""
DUAL_STEP, LAST_DUAL_STEP = 0.3, 0.01
"""Steps of the multiplier's logarithm."""


def pdpgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    *,
    generator: torch.Generator,
    steps: int = 300,
    restarts: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): the closest images to x (N, ...), by descent on the norm plus a multiplied margin.

    y (N,); norm linf, l2 or l1. Each step descends the constraint that the model is fooled, then applies the norm's
    proximal operator, which keeps an l1 change sparse; the multiplier of each example rises while the constraint does
    not hold and falls while it does (Matyasko & Chau 2021). Here the constraint is the margin over its gradient's dual
    norm: it has the norm's units, so that the multiplier is near 1 whatever the scale of the logits.
    A restart costs steps + 21 forwards and steps + 1 + min(9, classes - 1) backwards an example, the last stretch
    (`polish`) among them.

    Raises:
        AttackError: the model's output has no gradient.
    """
    return minimise(partial(_search, steps=steps), model, x, y, norm, restarts=restarts, generator=generator)


def _search(found: Closest, images: Tensor, *, steps: int) -> None:
    # In linf the gradient over its dual norm (the sum of its entries) moves a value by about 1 / values.
    unit = float(found.x[:1].numel()) if found.norm == "linf" else 1.0
    multiplier = torch.zeros_like(found.shortest)
    for step in range(steps):
        reached, gradient = found.gradient(images)
        slope = found.slope(gradient)
        change = images - found.x
        # How far the boundary is to first order, over how far the change goes: positive while the model is right.
        violation = -reached / slope / distances(change, found.norm).clamp_min(1e-12)
        multiplier = multiplier + falling(DUAL_STEP, LAST_DUAL_STEP, step, steps) * violation.clamp(-1, 1)
        size = unit * falling(FIRST_STEP, LAST_STEP, step, steps)
        moved = change + found.wide(size * multiplier.exp() / slope) * gradient
        images = (found.x + proximal(moved, found.norm, size)).clamp(0, 1)
    found.probe(images)


def proximal(change: Tensor, norm: Norm, size: float) -> Tensor:
    """Return the minimiser of size * norm(z) + |z - change|^2 / 2 for each change (N, ...).

    l1: values are moved by `size` towards 0; l2: the whole change is; linf: its peaks are cut, by `size` in all, which
    is Moreau's decomposition (Parikh & Boyd 2014, Proximal Algorithms, sections 6.5 and 2.5).
    """
    if norm == "l1":
        return change.sign() * (change.abs() - size).clamp_min(0)
    if norm == "l2":
        return change * (1 - size / l2_norm(change)).clamp_min(0)
    return change - onto_l1_ball(change, size)


@dataclass(frozen=True)
class Pdpgd:
    """Primal-dual proximal gradient: the smallest change that fools, under l1, l2 or linf (Matyasko & Chau 2021)."""

    minimum_norm: ClassVar[bool] = True
    seeded_by_example: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")

    steps: PositiveInt = 300
    restarts: PositiveInt = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the closest images that fool the model, whatever the threat's eps."""
        norm = checked_norm("pdpgd", threat, self.norms)
        return pdpgd(model, x, y, norm, generator=generator, steps=self.steps, restarts=self.restarts)[0]
