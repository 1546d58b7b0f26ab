"""The last stretch, the same for every attack: shorten what it found as far as a few more looks allow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustkit.attacks.hyperplane import onto_hyperplane
from robustkit.attacks.losses import as_logits, margin_to, wrong_classes
from robustkit.attacks.minimum_norm.closest import HAIR, Closest
from robustkit.attacks.projection import distances
from robustkit.attacks.search import input_gradient

LINE = 6
"""Looks of a line search."""
TARGETS = 9
"""So many of the likeliest wrong classes are looked at for a nearer boundary."""
CLEAR = 4 * HAIR
"""The margin that is aimed at beyond a boundary, as a share of the largest logit: a little more than counts."""


def polish(found: Closest) -> None:
    """Shorten the best changes by a few more looks: a change never grows.

    A line search towards the clean image; then two more towards the closest point where the model is fooled to first
    order: first by the class for which that is nearest, then by the class of the image itself. 20 forwards and
    min(9, classes - 1) + 1 backwards an example. For l0 the same with `fewer` instead of line searches.

    Raises:
        AttackError: the model's output has no gradient.
    """
    if found.norm == "l0":
        change = found.best - found.x
        fewer(found, change, change.abs())
        for targets in (TARGETS, 1):
            fewer(found, *steepest_values(found, targets))
        return
    pull(found, found.x, first=0.5)
    for targets in (TARGETS, 1):
        pull(found, tangent(found, targets), first=1.0)


def pull(found: Closest, towards: Tensor, *, first: float) -> None:
    """Look by bisection for the image nearest to `towards` (N, ...), on the way from the best one, that still fools.

    On the way to a shorter change none is longer than that at the start.
    """
    start = found.best
    reach = torch.zeros(len(start), device=start.device)
    beyond, share = torch.ones_like(reach), torch.full_like(reach, first)
    for _ in range(LINE):
        fooled = found.probe(start + found.wide(share) * (towards - start))
        reach, beyond = torch.where(fooled, share, reach), torch.where(fooled, beyond, share)
        share = (reach + beyond) / 2


def tangent(found: Closest, targets: int) -> Tensor:
    """Return the images in the box that are closest to x and fool the model to first order around the best ones.

    Of the `targets` likeliest wrong classes that with the nearest boundary is taken. The projection of FAB (Croce &
    Hein 2020, arXiv 1907.02044, section 3.1), from the clean image.
    """
    clean, flat = found.x.flatten(1), found.best.flatten(1)
    nearest, shortest = clean, torch.full_like(found.shortest, torch.inf)
    for reached, normal in _boundaries(found, targets):
        offset = (normal * flat).sum(1) - reached
        change = onto_hyperplane(clean, normal, offset, found.norm)
        length = distances(change, found.norm)
        closer = length < shortest
        nearest = torch.where(closer[:, None], clean + change, nearest)
        shortest = torch.where(closer, length, shortest)
    return nearest.clamp(0, 1).view(found.x.shape)


def steepest_values(found: Closest, targets: int) -> tuple[Tensor, Tensor]:
    """Return (change, gain): each value taken to the bound that fools the model more, and its share to first order.

    The class is that of the `targets` likeliest wrong ones which needs the fewest values to first order.
    """
    clean, flat = found.x.flatten(1), found.best.flatten(1)
    change, gain = torch.zeros_like(clean), torch.zeros_like(clean)
    fewest = torch.full_like(found.shortest, torch.inf)
    for reached, normal in _boundaries(found, targets):
        to_bound = torch.where(normal > 0, 1 - clean, -clean)
        gained = normal * to_bound
        need = (normal * (flat - clean)).sum(1) - reached
        count = (gained.sort(1, descending=True).values.cumsum(1) <= need[:, None]).sum(1)
        less = count < fewest
        change = torch.where(less[:, None], to_bound, change)
        gain = torch.where(less[:, None], gained, gain)
        fewest = torch.where(less, count, fewest)
    return change.view(found.x.shape), gain.view(found.x.shape)


def _boundaries(found: Closest, targets: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the margin (N,) of the best images to each of the likeliest wrong classes, and its gradient (N, D).

    Less what it takes to count: zero is where the boundary is crossed clearly.
    """
    start = found.best.detach().requires_grad_()
    with torch.enable_grad():
        logits = as_logits(found.model(start).float())
        classes = wrong_classes(logits.detach(), found.y)[:, :targets]
        clear = CLEAR * logits.detach().abs().amax(1)
        reached = [margin_to(logits, found.y, classes[:, rank]) - clear for rank in range(classes.shape[1])]
    for rank, one in enumerate(reached):
        gradient = input_gradient(one.sum(), start, keep=rank + 1 < len(reached))
        yield one.detach(), gradient.flatten(1)


def fewer(found: Closest, change: Tensor, gain: Tensor) -> None:
    """Look by bisection for the smallest number of values of `change` (N, ...), largest gain first, that fools."""
    rank = gain.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view(change.shape)
    values = max(1, change[:1].numel())
    few, enough = torch.zeros(len(change), device=change.device), found.shortest.clamp(max=values)
    for _ in range(values.bit_length()):
        count = ((few + enough) / 2).floor()
        fooled = found.probe(torch.where(rank < found.wide(count), found.x + change, found.x).clamp(0, 1))
        few, enough = torch.where(fooled, few, count), torch.where(fooled, count, enough)
