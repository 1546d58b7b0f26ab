"""DropBlock: dropout of square regions of feature maps, put into any model for the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustkit.defenses.dropout import places
from robustkit.defenses.surgery import attach, attached, detach
from robustkit.errors import UsageError
from robustkit.params import Fraction, PositiveInt
from robustkit.train.hooks import Defense

KIND = "drop_block"


def block_mask(centres: Tensor, size: int) -> Tensor:
    """Return 0 in the square of `size` pixels below and right of every centre that is 1, and 1 elsewhere.

    centres: (N, C, H - size + 1, W - size + 1) of zeros and ones. Returns (N, C, H, W).
    """
    edge = size - 1
    padded = functional.pad(centres, (edge, edge, edge, edge))
    return 1 - functional.max_pool2d(padded, size, stride=1)


def drop_block(x: Tensor, p: float, size: int) -> Tensor:
    """Return maps (N, C, H, W) with squares of `size` set to 0, the rest scaled up to keep the mean.

    About a share p is dropped (Ghiasi et al. 2018, equation 1): each square begins with the chance that gives it.
    A map that is smaller than `size` takes the largest square that fits. Drawn by torch's own generator.
    """
    height, width = x.shape[2:]
    side = min(size, height, width)
    rows, columns = height - side + 1, width - side + 1
    chance = min(1.0, p * height * width / (side * side * rows * columns))
    centres = torch.empty_like(x[:, :, :rows, :columns], dtype=torch.float32).bernoulli_(chance)
    kept = block_mask(centres, side)
    # A batch in which everything is dropped has nothing to scale up.
    return x * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(x.dtype)


class DropBlockLayer(nn.Module):
    """DropBlock in train mode, the identity in eval mode."""

    def __init__(self, p: float, size: int) -> None:
        super().__init__()
        self.p, self.size = p, size

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps with squares dropped."""
        return drop_block(x, self.p, self.size) if self.training and self.p > 0 else x


def insert_drop_block(model: nn.Module, *, p: float, size: int) -> nn.Module:
    """Insert DropBlock after every convolution, behind the batch norm where one follows, in place; return the model.

    Raises UsageError where the model has no convolution, or has DropBlock inserted already.
    """
    if attached(model, KIND):
        raise UsageError("drop_block was inserted into this model already: use it once")
    _, convolutions = places(model)
    if not convolutions:
        raise UsageError("drop_block: this model has no convolution")
    for module in convolutions:
        attach(module, DropBlockLayer(p, size), KIND)
    return model


@dataclass(frozen=True)
class DropBlock(Defense):
    """Drop squares of the maps after every convolution while training (Ghiasi et al. 2018).

    p is the share of a map that is dropped, in [0, 1]; size is the side of a square in pixels of the map.
    """

    p: Fraction = 0.1
    size: PositiveInt = 3

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model with DropBlock inserted."""
        return insert_drop_block(model, p=self.p, size=self.size)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Return the model without it."""
        return detach(model, KIND)
