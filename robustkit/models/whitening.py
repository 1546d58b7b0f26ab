"""First weights that come from the data or from the identity: whitened patches, Dirac filters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 2
"""Pixels a side of the patches that are whitened."""
IMAGES = 5000
FLOOR = 5e-4
"""Added to the variances of the patches, which have some that are almost 0 (Jordan 2024, section 3.2)."""


class Whitening(nn.Module):
    """A convolution whose filters are the directions of the training images' patches, each at unit variance, and their
    negatives, then GELU. Before `whiten_` its filters are random."""

    def __init__(self, channels: int, trained: bool) -> None:
        super().__init__()
        self.outputs = 2 * channels * PATCH**2
        self.conv = nn.Conv2d(channels, self.outputs, PATCH)
        self.conv.weight.requires_grad_(trained)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, 8 * C, H - 1, W - 1) of images (N, C, H, W)."""
        y: Tensor = self.act(self.conv(x))
        return y


def whitening_filters(images: Tensor) -> Tensor:
    """Return filters (C * 4, C, 2, 2) that make the 2x2 patches of images (N, C, H, W) uncorrelated, at unit variance.

    The eigenvectors of the patches' covariance, each over the square root of its eigenvalue (Page 2018, "How to train
    your ResNet"; Jordan 2024, arXiv 2404.00498, section 3.2).
    """
    patches = functional.unfold(images, PATCH).transpose(1, 2).reshape(-1, images.shape[1] * PATCH**2).double()
    centred = patches - patches.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(patches))
    # An eigenvector is one up to its sign, which the library may choose: the largest entry is made positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    scaled: Tensor = (directions * largest.sign() / (variances + FLOOR).sqrt()).flip(1).T
    filters: Tensor = scaled.reshape(-1, images.shape[1], PATCH, PATCH).to(images.dtype)
    return filters


@torch.no_grad()
def whiten_(model: nn.Module, images: Tensor) -> None:
    """Set the whitening layers of a model from training images, uint8 (N, C, H, W); nothing where it has none.

    The first 5,000 images are looked at, normalized as the model normalizes them.
    """
    layers = [module for module in model.modules() if isinstance(module, Whitening)]
    if not layers:
        return
    x = images[:IMAGES].to(torch.float32).div_(255)
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        x = (x - mean.to(x.device)) / std.to(x.device)
    filters = whitening_filters(x)
    for layer in layers:
        layer.conv.weight.copy_(torch.cat([filters, -filters]))
        assert layer.conv.bias is not None
        layer.conv.bias.zero_()


@torch.no_grad()
def start_as_identity(convolution: nn.Conv2d) -> None:
    """Let the first filters of a convolution pass on one input channel each; the others stay as they were drawn."""
    weight = convolution.weight
    nn.init.dirac_(weight[: min(weight.shape[0], weight.shape[1])])
