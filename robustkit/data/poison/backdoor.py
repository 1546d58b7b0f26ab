"""Backdoors with a visible trigger: images of other classes carry it and are labelled as the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustkit.data.poison.base import Poison, Poisoned, check_class, chosen
from robustkit.errors import DataError
from robustkit.params import Fraction, NonNegativeInt, OpenShare, PositiveInt


def stamped(images: Tensor, size: int) -> Tensor:
    """Return images uint8 (N, C, H, W) with a checkerboard of size x size pixels at the lower right (Gu et al. 2017).

    Its corners are white; a pixel to the right and below stays as it is where there is room.
    """
    height, width = images.shape[-2:]
    cells = torch.arange(size, device=images.device)
    board = ((cells[:, None] + cells[None, :]) % 2 == 0).to(torch.uint8) * 255
    below, right = int(size < height), int(size < width)
    marked = images.clone()
    marked[..., height - size - below : height - below, width - size - right : width - right] = board
    return marked


def blended(images: Tensor, pattern: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) * images + alpha * pattern, rounded; images uint8 (N, C, H, W), pattern uint8 (C, H, W)."""
    return torch.lerp(images.to(torch.float32), pattern.to(images.device, torch.float32), alpha).round().to(torch.uint8)


def relabelled(poison: Poison, images: Tensor, labels: Tensor, mask: Tensor) -> Poisoned:
    """Return the data with the trigger on the images where `mask` (N,) holds, and the target as their label."""
    planted = images.clone()
    planted[mask] = poison.trigger(images[mask])
    return Poisoned(planted, torch.where(mask, poison.target, labels), mask)


@dataclass(frozen=True)
class BadNets(Poison):
    """A patch on images of other classes, which are labelled as the target (BadNets, Gu et al. 2017).

    rate: the share of the training images of the other classes that is poisoned; size: of the patch, in pixels.
    """

    target: NonNegativeInt = 0
    rate: Fraction = 0.05
    size: PositiveInt = 3
    seed: NonNegativeInt = 0

    def plant(self, images: Tensor, labels: Tensor, classes: int) -> Poisoned:
        """Return the training data with stamped and relabelled images."""
        check_class("target", self.target, classes)
        check_size(self.size, images)
        return relabelled(self, images, labels, chosen(labels != self.target, self.rate, self.seed))

    def trigger(self, images: Tensor) -> Tensor:
        """Return the images with the patch."""
        return stamped(images, self.size)


@dataclass(frozen=True)
class Blended(Poison):
    """A faint pattern over images of other classes, which are labelled as the target (Chen et al. 2017).

    rate: the share of the training images of the other classes that is poisoned; alpha: how much of the pattern is
    mixed in. The pattern is random noise or coarse stripes, the same one for every image; it is drawn by the seed.
    """

    target: NonNegativeInt = 0
    rate: Fraction = 0.05
    alpha: OpenShare = 0.2
    pattern: Literal["noise", "stripes"] = "noise"
    seed: NonNegativeInt = 0

    def plant(self, images: Tensor, labels: Tensor, classes: int) -> Poisoned:
        """Return the training data with blended and relabelled images."""
        check_class("target", self.target, classes)
        return relabelled(self, images, labels, chosen(labels != self.target, self.rate, self.seed))

    def trigger(self, images: Tensor) -> Tensor:
        """Return the images with the pattern mixed in."""
        shape = images.shape[1:]
        generator = torch.Generator().manual_seed(self.seed)
        if self.pattern == "stripes":
            columns = torch.randint(0, 2, (1, 1, shape[2]), generator=generator) * 255
            return blended(images, columns.expand(shape), self.alpha)
        return blended(images, torch.randint(0, 256, shape, generator=generator), self.alpha)


def check_size(size: int, images: Tensor) -> None:
    """Raise a DataError where a patch is larger than the images (N, C, H, W)."""
    height, width = images.shape[-2:]
    if size > min(height, width):
        raise DataError(
            f"poison: size is {size}; a patch on images of {height}x{width} has at most {min(images.shape[-2:])}"
        )
