"""Larger models that start as the function of a smaller one: Net2Net (Chen et al. 2016), wider and deeper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import ConvGroup, SmallCnn


def copies(old: int, new: int, generator: torch.Generator) -> Tensor:
    """Return for each of `new` channels (int64) which of the `old` ones it repeats: all of them, then random ones."""
    extra = torch.randint(old, (new - old,), generator=generator)
    return torch.cat([torch.arange(old), extra])


def shared(weight: Tensor, source: Tensor) -> Tensor:
    """Return a weight (outputs, inputs, ...) for repeated inputs: each copy has its part of the old weight."""
    counts = torch.bincount(source, minlength=weight.shape[1]).to(weight)
    return (weight / counts.view(1, -1, *[1] * (weight.dim() - 2)))[:, source]


def grow(small: nn.Module, large: nn.Module, generator: torch.Generator) -> None:
    """Give a larger model of a recipe, of the same kind, the function of a smaller one.

    Raises:
        ModelError: the two are not small_cnn both, or `large` has another number of groups or a narrower one.
    """
    one, other = getattr(small, "inner", small), getattr(large, "inner", large)
    if not isinstance(one, SmallCnn) or not isinstance(other, SmallCnn):
        raise ModelError(f"{type(one).__name__} cannot grow into {type(other).__name__}; only small_cnn grows")
    grow_small_cnn(one, other, generator)
    if isinstance(small, Normalized) and isinstance(large, Normalized):
        large.mean.copy_(small.mean)
        large.std.copy_(small.std)


@torch.no_grad()
def grow_small_cnn(small: SmallCnn, large: SmallCnn, generator: torch.Generator) -> None:
    """Give `large` weights with which it computes the logits of `small`; both in eval mode, to rounding.

    Raises:
        ModelError: `large` has another number of groups, or one that is narrower.
    """
    old = [group for group in small.groups if isinstance(group, ConvGroup)]
    new = [group for group in large.groups if isinstance(group, ConvGroup)]
    widths = [[group.conv1.out_channels for group in groups] for groups in (old, new)]
    if len(old) != len(new) or any(before > after for before, after in zip(*widths, strict=False)):
        raise ModelError(
            f"small_cnn cannot grow from widths {widths[0]} to {widths[1]}: as many groups, none of them narrower"
        )
    if (small.whitening is None) != (large.whitening is None):
        raise ModelError("small_cnn cannot grow with `whiten` in one of the two models alone; give both the same")
    if small.whitening is not None and large.whitening is not None:
        large.whitening.load_state_dict(small.whitening.state_dict())
    before = torch.arange(old[0].conv1.in_channels)
    for one, other in zip(old, new, strict=True):
        inside = copies(one.conv1.out_channels, other.conv1.out_channels, generator)
        after = copies(one.conv2.out_channels, other.conv2.out_channels, generator)
        other.conv1.weight.copy_(shared(one.conv1.weight, before)[inside])
        other.conv2.weight.copy_(shared(one.conv2.weight, inside)[after])
        _repeat_norm(one.norm1, other.norm1, inside)
        _repeat_norm(one.norm2, other.norm2, after)
        before = after
    large.head.weight.copy_(shared(small.head.weight, before))
    large.head.bias.copy_(small.head.bias)


def _repeat_norm(old: nn.BatchNorm2d, new: nn.BatchNorm2d, source: Tensor) -> None:
    for name, value in old.state_dict().items():
        new.state_dict()[name].copy_(value[source] if value.dim() else value)
