"""Larger models that start as the function of a smaller one: Net2Net (Chen et al. 2016), wider and deeper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.grow_baseline import grow_baseline_cnn
from robustkit.models.grow_small import grow_small_cnn
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn


@torch.no_grad()
def grow(small: nn.Module, large: nn.Module, generator: torch.Generator, images: Tensor | None = None) -> None:
    """Give a larger model of a recipe, of the same kind, the function of a smaller one; both in eval mode, to rounding.

    images: training images (N, C, H, W) in [0, 1], on which new batch norms are measured.

    Raises:
        ModelError: the two are not small_cnn both or baseline_cnn both, or `large` lacks something that `small` has.
    """
    if isinstance(small, Normalized) and isinstance(large, Normalized):
        large.mean.copy_(small.mean)
        large.std.copy_(small.std)
        images = None if images is None else (images - large.mean) / large.std
    one, other = getattr(small, "inner", small), getattr(large, "inner", large)
    if isinstance(one, SmallCnn) and isinstance(other, SmallCnn):
        grow_small_cnn(one, other, generator)
    elif isinstance(one, BaselineCnn) and isinstance(other, BaselineCnn):
        grow_baseline_cnn(one, other, generator, images)
    else:
        raise ModelError(
            f"{type(one).__name__} cannot grow into {type(other).__name__}; small_cnn and baseline_cnn grow, each into "
            "its own kind"
        )
