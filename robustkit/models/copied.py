"""What growing a model is made of: copied channels that share their outgoing weights, and layers that do nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError


@dataclass(frozen=True)
class Copies:
    """Which old channel each new one repeats (new,) int64, and its part (new,) of the old one's outgoing weights."""

    source: Tensor
    part: Tensor

    def flattened(self, area: int) -> Copies:
        """Return the same for maps of so many pixels that are laid out one after the other."""
        source = (self.source[:, None] * area + torch.arange(area)).flatten()
        return Copies(source, self.part.repeat_interleave(area))


def unchanged(channels: int) -> Copies:
    """Return each channel once."""
    return Copies(torch.arange(channels), torch.ones(channels))


def copies(old: int, new: int, generator: torch.Generator) -> Copies:
    """Return copies of all the `old` channels and of random ones, `new` together (Net2WiderNet, Chen et al. 2016).

    The copies of one channel have different parts, at least 1 to 3: with equal ones they would get equal gradients and
    never part.
    """
    source = torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])
    weight = 0.5 + torch.rand(new, generator=generator)
    return Copies(source, weight / torch.zeros(old).index_add(0, source, weight)[source])


def shared(weight: Tensor, inputs: Copies) -> Tensor:
    """Return a weight (outputs, inputs, ...) for repeated inputs: each copy has its part of the old weight."""
    part = inputs.part.to(weight).view(1, -1, *[1] * (weight.dim() - 2))
    return weight[:, inputs.source] * part


def widen(old: nn.Conv2d | nn.Linear, new: nn.Conv2d | nn.Linear, inputs: Copies, outputs: Copies) -> None:
    """Give a wider layer the old one's weights."""
    new.weight.copy_(shared(old.weight, inputs)[outputs.source])
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias[outputs.source])


def repeat_norm(old: nn.BatchNorm2d, new: nn.BatchNorm2d, outputs: Copies) -> None:
    """Give a wider batch norm the old one's weights and statistics."""
    for name, value in old.state_dict().items():
        new.state_dict()[name].copy_(value[outputs.source] if value.dim() else value)


def copying_conv(conv: nn.Conv2d, outputs: Copies) -> None:
    """Make a convolution return its input channels, each as often as it is copied: a dirac at its centre."""
    conv.weight.zero_()
    rows, columns = (side // 2 for side in conv.kernel_size)
    conv.weight[torch.arange(len(outputs.source)), outputs.source, rows, columns] = 1.0
    if conv.bias is not None:
        conv.bias.zero_()


def passing_norm(norm: nn.Module, x: Tensor | None, what: str) -> None:
    """Make a batch norm return its input in eval mode; its statistics are those of x (N, C, H, W).

    In training it goes by each batch's own statistics, and so is the identity as far as these are those of x.

    Raises:
        ModelError: there is no x to measure.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return
    if x is None:
        raise ModelError(f"{what}: the statistics of its new batch norms are measured: pass training images")
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(x.mean((0, 2, 3)))
    norm.running_var.copy_(x.var((0, 2, 3)))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
