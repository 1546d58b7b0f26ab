"""Mixing: training images and labels blended with those of another example of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustkit.params import Fraction, PositiveFloat
from robustkit.train.hooks import Batch, Defense, Step


def beta_shares(like: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Return one draw from Beta(alpha, alpha) an example (N,), on like's device; the generator's device is the same."""
    # A gamma that underflows to 0 in both draws would give 0 / 0: the halves are then as good as any.
    least = torch.finfo(torch.float32).tiny
    concentration = torch.full_like(like[:, 0, 0, 0], alpha, dtype=torch.float32)
    first = torch._standard_gamma(concentration, generator=generator).clamp(min=least)
    second = torch._standard_gamma(concentration, generator=generator).clamp(min=least)
    return first / (first + second)


def partners(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random permutation (N,) of the batch: with whom each example is mixed."""
    draws = torch.empty_like(like[:, 0, 0, 0], dtype=torch.float32).uniform_(generator=generator)
    return draws.argsort()


def mix(x: Tensor, target: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return share * own + (1 - share) * partner's, of images (N, C, H, W) and of targets (N, classes).

    other: each example's partner (N,). share: what it keeps of its own (N,), in [0, 1] (mixup, Zhang et al. 2018).
    """
    own, label = share.view(-1, 1, 1, 1).to(x.dtype), share.view(-1, 1).to(target.dtype)
    return own * x + (1 - own) * x[other], label * target + (1 - label) * target[other]


def paste(x: Tensor, target: Tensor, other: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Return images with their partner's pixels where box is true, and targets mixed by area (CutMix, Yun et al. 2019).

    x: (N, C, H, W). target: (N, classes). other: (N,). box: booleans (N, H, W).
    """
    pasted = box.flatten(1).to(target.dtype).mean(1, keepdim=True)
    return torch.where(box[:, None], x[other], x), (1 - pasted) * target + pasted * target[other]


def random_boxes(x: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
    """Return booleans (N, H, W): a box of the image's proportions that covers 1 - share of it, cut at the border.

    share: (N,). The centre is uniform over the pixels, as in the paper.
    """
    height, width = x.shape[2:]
    centre = torch.stack([torch.empty_like(share).uniform_(generator=generator) for _ in range(2)], dim=1)
    side = (1 - share).sqrt()[:, None]
    rows = _inside(centre[:, :1], side, height)
    columns = _inside(centre[:, 1:2], side, width)
    return rows[:, :, None] & columns[:, None, :]


def _inside(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Return which of `length` pixels lie in a span (N, length); centre and side (N, 1) are shares of the length."""
    cut = (side * length).floor()
    low = (centre * length).floor() - (cut / 2).floor()
    pixels = torch.arange(length, device=centre.device)
    return (pixels >= low) & (pixels < low + cut)


@dataclass(frozen=True)
class Mixup(Defense):
    """Blend images and labels with those of another example: mixup (Zhang et al. 2018).

    alpha: the share is drawn from Beta(alpha, alpha), for each example anew; probability: share of examples mixed.
    """

    alpha: PositiveFloat = 0.2
    probability: Fraction = 1.0

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Return the batch with mixed images and soft targets."""
        share = _spared(beta_shares(batch.x, self.alpha, step.generator), self.probability, step.generator)
        x, target = mix(batch.x, batch.soft_target(), partners(batch.x, step.generator), share)
        return replace(batch, x=x, target=target)


@dataclass(frozen=True)
class CutMix(Defense):
    """Paste a box of another example's image, and mix the labels by its area: CutMix (Yun et al. 2019).

    alpha: the area kept is drawn from Beta(alpha, alpha), for each example anew; probability: share of examples mixed.
    """

    alpha: PositiveFloat = 1.0
    probability: Fraction = 0.5

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Return the batch with pasted boxes and soft targets."""
        share = _spared(beta_shares(batch.x, self.alpha, step.generator), self.probability, step.generator)
        box = random_boxes(batch.x, share, step.generator)
        x, target = paste(batch.x, batch.soft_target(), partners(batch.x, step.generator), box)
        return replace(batch, x=x, target=target)


def _spared(share: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return the shares with those of examples that are not to be mixed set to 1."""
    if probability >= 1:
        return share
    mixed = torch.empty_like(share).uniform_(generator=generator) < probability
    return torch.where(mixed, share, 1.0)
