"""Augmentation on whole batches, on the device, by a generator of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.errors import UsageError
from robustkit.params import PositiveFloat, PositiveInt


class Augmentation(Protocol):
    """Changes a batch of images (N, C, H, W), float in [0, 1]; labels stay."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the changed batch, same shape."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a batch stands in a training: its epoch from 0, a seed that is the same in all of them, and the positions
    (N,) of its images in the training split."""

    epoch: int
    seed: int
    positions: Tensor


@runtime_checkable
class Placed(Protocol):
    """An augmentation that looks at which images these are; it is called in place of `__call__`."""

    def placed(self, images: Tensor, place: Place, generator: torch.Generator) -> Tensor:
        """Return the changed batch, same shape."""
        ...


def augmented(images: Tensor, augment: Sequence[Augmentation], place: Place, generator: torch.Generator) -> Tensor:
    """Return a batch after every augmentation, in their order."""
    for one in augment:
        images = one.placed(images, place, generator) if isinstance(one, Placed) else one(images, generator)
    return images


def random_crop(images: Tensor, padding: int, mode: str, generator: torch.Generator) -> Tensor:
    """Return each image shifted by up to `padding` pixels each way, the border filled by reflection or with zeros."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4, mode=mode)
    span = 2 * padding + 1
    device = images.device
    top = torch.randint(span, (count, 1), generator=generator, device=device)
    left = torch.randint(span, (count, 1), generator=generator, device=device)
    # A view of every window; one index an image copies whole rows.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    return windows[torch.arange(count, device=device), top.flatten(), left.flatten()]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image mirrored left to right with probability one half."""
    draw = torch.rand(images.shape[0], generator=generator, device=images.device) < 0.5
    return torch.where(draw[:, None, None, None], images.flip(3), images)


def alternating_flip(images: Tensor, positions: Tensor, epoch: int, seed: int) -> Tensor:
    """Return each image mirrored left to right in every other epoch (Jordan 2024, arXiv 2404.00498, section 3.6).

    positions (N,): which images of the training split these are. Half of the images, by a draw that depends on seed
    and position alone, are mirrored in even epochs, the others in odd ones: two epochs show both sides of every image.
    """
    mirrored = (_coin(positions, seed) + epoch) % 2 == 1
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _coin(positions: Tensor, seed: int) -> Tensor:
    """Return 0 or 1 (N,) for each position, as good as drawn (the mixer of splitmix64, Steele et al. 2014)."""
    mixed = positions.to(torch.int64) + seed % 2**31 + 1
    for factor, shift in ((-7046029254386353131, 30), (-4658895280553007687, 27), (-7723592293110705685, 31)):
        mixed = mixed * factor
        # The arithmetic shift of a signed number drags its sign along; the mask takes it off again.
        mixed = mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))
    return mixed & 1


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return each image with a square of `size` pixels around a random centre set to zero (DeVries & Taylor 2017)."""
    count, _, height, width = images.shape
    device = images.device
    row = torch.randint(height, (count, 1), generator=generator, device=device)
    column = torch.randint(width, (count, 1), generator=generator, device=device)
    low, high = size // 2, size - size // 2
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    inside_rows = (rows >= row - low) & (rows < row + high)
    inside_columns = (columns >= column - low) & (columns < column + high)
    hole = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return images.masked_fill(hole, 0.0)


def gaussian_noise(images: Tensor, sigma: float, generator: torch.Generator, *, clip: bool = True) -> Tensor:
    """Return each image plus Gaussian noise of deviation `sigma`, in pixel units; with clip, kept in [0, 1]."""
    noisy = images + sigma * torch.empty_like(images).normal_(generator=generator)
    return noisy.clamp(0, 1) if clip else noisy


@dataclass(frozen=True)
class Crop:
    """Random crop of the padded image: shifts by up to `padding` pixels."""

    padding: PositiveInt = 4
    mode: Literal["reflect", "constant"] = "reflect"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the shifted batch.

        Raises:
            UsageError: the images have no `padding` pixels to reflect.
        """
        height, width = images.shape[2:]
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise UsageError(
                f"crop: padding is {self.padding}; {min(height, width) - 1} pixels at most can be reflected in images "
                f"of {height}x{width}: lower it, or set mode: constant"
            )
        return random_crop(images, self.padding, self.mode, generator)


@dataclass(frozen=True)
class Flip:
    """Mirror left to right with probability one half; with alternate, every image in every other epoch (Jordan 2024).

    Of two epochs with `alternate` one shows an image as it is and the other its mirror image, instead of the same one
    twice half of the time.
    """

    alternate: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with half of it mirrored."""
        return random_flip(images, generator)

    def placed(self, images: Tensor, place: Place, generator: torch.Generator) -> Tensor:
        """Return the batch with those mirrored whose turn it is."""
        if not self.alternate:
            return random_flip(images, generator)
        return alternating_flip(images, place.positions, place.epoch, place.seed)


@dataclass(frozen=True)
class Cutout:
    """Set a random square to zero (DeVries & Taylor 2017, arXiv 1708.04552)."""

    size: PositiveInt = 8

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a hole in each image."""
        return cutout(images, self.size, generator)


@dataclass(frozen=True)
class GaussianNoise:
    """Add Gaussian noise of deviation sigma, in pixel units (Bishop 1995; Cohen et al. 2019).

    clip keeps the image in [0, 1]; without it the noise is the one that randomized_smoothing certifies under.
    """

    sigma: PositiveFloat = 0.1
    clip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noisy batch."""
        return gaussian_noise(images, self.sigma, generator, clip=self.clip)
