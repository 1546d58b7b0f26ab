"""The shortest way onto a hyperplane inside the image box, a batch at a time, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.threat import Norm


def onto_hyperplane(x: Tensor, normal: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """Return the smallest change of x (N, D) in [0, 1], in the norm, with <normal, x + change> = offset.

    normal (N, D), offset (N,). Where the box allows no such point, every pixel goes as far towards it as it can. The
    box-constrained projections of Croce & Hein 2020 (arXiv 1907.02044, section 3.1).
    """
    need = offset - (normal * x).sum(1)
    direction = torch.where((need >= 0)[:, None], normal, -normal)
    need = need.abs()
    steep = direction.abs()
    room = torch.where(direction > 0, 1 - x, x) * (steep > 0)
    if norm == "l1":
        return direction.sign() * _steepest_first(steep, room, need)
    if norm == "linf":
        level = _level(steep, room, need)
        return direction.sign() * torch.minimum(room, level[:, None])
    # With the change level * steep, a pixel gains steep^2 for each unit of the level until it is at its bound.
    level = _level(steep.square(), room / steep.clamp_min(1e-30), need)
    return direction.sign() * torch.minimum(room, level[:, None] * steep)


def _level(rate: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """Return the level t (N,) with sum_i rate_i * min(t, limit_i) = need, the largest limit where none is enough."""
    limits, order = limit.sort(1)
    rates = rate.gather(1, order)
    done = (rates * limits).cumsum(1)
    # What still grows beyond each limit: the suffix sums of the rates.
    growing = rates.flip(1).cumsum(1).flip(1)
    after = growing - rates
    reached = done + limits * after
    place = torch.searchsorted(reached, need[:, None]).clamp_max(limit.shape[1] - 1)
    spent = torch.where(place > 0, done.gather(1, (place - 1).clamp_min(0)), torch.zeros_like(need)[:, None])
    speed = growing.gather(1, place).clamp_min(1e-30)
    level = ((need[:, None] - spent) / speed).squeeze(1)
    return torch.minimum(level.clamp_min(0), limits[:, -1])


def _steepest_first(steep: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Return how far each pixel goes (N, D): the steepest to its bound, then the next, until the need is met."""
    slopes, order = steep.sort(1, descending=True)
    rooms = room.gather(1, order)
    gains = slopes * rooms
    before = gains.cumsum(1) - gains
    used = ((need[:, None] - before) / slopes.clamp_min(1e-30)).clamp_min(0)
    return torch.zeros_like(room).scatter(1, order, torch.minimum(used, rooms))
