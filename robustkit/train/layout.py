"""Memory layout of a model: channels last where it takes it."""

from __future__ import annotations

import torch
from torch import nn


def to_channels_last(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device
) -> tuple[nn.Module, torch.memory_format]:
    """Return the model with channels-last weights where it takes such images, else as it was; and the images' layout.

    A model that calls `.view` on its maps does not; it is found out here, on two images of zeros.
    """
    x = torch.zeros(2, *shape, device=device).contiguous(memory_format=torch.channels_last)
    modes = {module: module.training for module in model.modules()}
    changed: nn.Module = model.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            changed.eval()(x)
        return changed, torch.channels_last
    except RuntimeError:
        back: nn.Module = model.to(memory_format=torch.contiguous_format)
        return back, torch.contiguous_format
    finally:
        for module, mode in modes.items():
            module.training = mode
