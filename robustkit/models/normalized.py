"""Normalization inside the model, so that images and eps stay in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """A model that takes images in [0, 1] and normalizes them itself.

    `mean` and `std` hold one number a channel, in [0, 1]; they are stored with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.inner((x - self.mean) / self.std)
        return logits


class Repeated(nn.Module):
    """A model for colour images that takes gray ones: the one channel is given three times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of gray images (N, 1, H, W)."""
        logits: Tensor = self.inner(x.expand(-1, 3, -1, -1))
        return logits
