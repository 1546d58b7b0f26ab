"""Images and labels as resident tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SUBSET_SEED = 20_190_220
"""Fixed, so that every run of every recipe attacks the same test examples."""


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, C, H, W) with labels (N,) int64. `index` (N,) is each example's first position."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def select(self, index: Tensor) -> Split:
        """Return the examples at these positions (int64) or where the mask (bool) holds."""
        index = index.to(self.labels.device)
        return Split(self.images[index.to(self.images.device)], self.labels[index], self.index[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.index.to(device))

    def floats(self, start: int, stop: int) -> Tensor:
        """Return images [start:stop] as float32 in [0, 1]."""
        return self.images[start:stop].to(torch.float32).div_(255)


def split_of(images: Tensor, labels: Tensor) -> Split:
    """Return a split of uint8 images (N, C, H, W) and labels (N,)."""
    return Split(images, labels.to(torch.int64), torch.arange(labels.shape[0], device=labels.device))


def fixed_subset(split: Split, examples: int | None) -> Split:
    """Return at most so many examples of a split, all for None: random ones, the same at each call."""
    order = np.random.default_rng(SUBSET_SEED).permutation(len(split))
    return split.select(torch.from_numpy(order[:examples].copy()))


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test data of one source. The validation split is cut from the training data."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: str
    mean: tuple[float, ...]
    """Mean of each channel of the training images, in [0, 1]."""
    std: tuple[float, ...]
    poisoned: Tensor | None = None
    """Which training examples (N,) bool are poisoned, where it is known; for figures only, no defense sees it."""
    held_out_poisoned: Tensor | None = None
    """The same of the validation split."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.test.shape
