"""The memory layout in which a model is attacked: channels last where it takes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def attack_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return the layout for images (N, C, H, W): channels last for a model with convolutions that takes it.

    A model that calls `.view` on its maps does not: this is found out on two of the images. What decides is the model
    and not a clock, so that a run gives the same numbers again.
    """
    if images.dim() != 4 or not any(isinstance(module, CONVOLUTIONS) for module in model.modules()):
        return torch.contiguous_format
    try:
        with torch.no_grad():
            model(laid_out(images[:2], torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images in this layout, with the gradient going through."""
    if layout is not torch.channels_last:
        return images
    # `.contiguous` would leave images of one channel as they are, and with them the layout of every map after them.
    return torch.empty_like(images, memory_format=layout).copy_(images)
