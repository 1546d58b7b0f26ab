"""Adversarial images as an 8-bit file holds them: multiples of 1/255, still within the adversary's ball."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.threat import Norm
from robustkit.errors import UsageError

LEVELS = 255
OFF_GRID = 1e-2
"""How far, in levels, an image may be from 8 bits: float32 keeps k/255 to better than 1e-4 levels."""


def rounded(found: Tensor, x: Tensor, norm: Norm, budget: Tensor) -> Tensor:
    """Return `found` (N, ...) in [0, 1] rounded to multiples of 1/255, no further than `budget` (N,) from x (N, ...).

    Each value goes to its nearest level where the ball has room for that, else to the next one towards the clean
    image, so that it comes nearer to that. Under l2 and l1 the room is for those that are nearest to their level first.

    Raises:
        UsageError: x is not of 8 bits itself, so that the levels around it need not lie in the ball.
    """
    level = x * LEVELS
    clean = level.round()
    if bool(((level - clean).abs() > OFF_GRID).any()):
        raise UsageError(
            "quantize_input judges images of 8 bits, but these are not multiples of 1/255: give uint8, or round them, "
            "e.g. (255 * x).round() / 255"
        )
    change = found * LEVELS - clean
    least, nearest = change.trunc(), change.round()
    room = budget.view(-1, *[1] * (x.dim() - 1)) * LEVELS
    if norm == "linf":
        chosen = torch.where(nearest.abs() <= room, nearest, least)
    else:
        chosen = _within_budget(change, nearest, least, room, 2 if norm == "l2" else 1)
    return ((clean + chosen) / LEVELS).clamp(0, 1)


def _within_budget(change: Tensor, nearest: Tensor, least: Tensor, room: Tensor, power: int) -> Tensor:
    """Return `nearest` for as many values as there is room for, those with the smallest error first, else `least`."""
    shape = change.shape
    change, nearest, least = (one.flatten(1).double() for one in (change, nearest, least))
    price = nearest.abs().pow(power) - least.abs().pow(power)
    left = room.flatten(1).double().pow(power) - least.abs().pow(power).sum(1, keepdim=True)
    order = (change - nearest).abs().argsort(dim=1, stable=True)
    spent = price.gather(1, order).cumsum(1)
    allowed = torch.zeros_like(price, dtype=torch.bool).scatter(1, order, spent <= left)
    return torch.where(allowed, nearest, least).view(shape).to(torch.float32)
