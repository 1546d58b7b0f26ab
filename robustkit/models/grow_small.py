"""small_cnn, wider and with more groups, as the function of a smaller one."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.errors import ModelError
from robustkit.models.copied import Copies, copies, copying_conv, passing_norm, repeat_norm, unchanged, widen
from robustkit.models.small_cnn import ConvGroup, SmallCnn
from robustkit.recipe.growth import wrong_widths

LINEAR = 6.0
"""GELU returns what is above its input's least value, -0.17, plus this, to 2e-8: it is not the identity of its own
outputs, as ReLU is, but nearly so far from zero."""


@torch.no_grad()
def grow_small_cnn(small: SmallCnn, large: SmallCnn, generator: torch.Generator, images: Tensor | None = None) -> None:
    """Give `large` weights with which it computes the logits of `small`; both in eval mode, to rounding.

    images: normalized training images (N, C, H, W), on which the batch norms of new groups are measured.

    Raises:
        ModelError: one of the two alone whitens, a group is missing or narrower, a new one pools a map with an odd
            number of pixels a side, or there are new ones and no images.
    """
    images = _whitened(small, large, images)
    old = [group for group in small.groups if isinstance(group, ConvGroup)]
    new = [group for group in large.groups if isinstance(group, ConvGroup)]
    widths = [[group.conv1.out_channels for group in groups] for groups in (old, new)]
    sides: set[int | None] = {None} if images is None else set(images.shape[-2:])
    for side in sides:
        wrong = wrong_widths(widths[0], widths[1], side)
        if wrong is not None:
            raise ModelError(f"small_cnn cannot grow from widths {widths[0]} to {widths[1]}: {wrong}")
    kept = unchanged(old[0].conv1.in_channels)
    for one, other in zip(old, new, strict=False):
        inside = copies(one.conv1.out_channels, other.conv1.out_channels, generator)
        after = copies(one.conv2.out_channels, other.conv2.out_channels, generator)
        widen(one.conv1, other.conv1, kept, inside)
        widen(one.conv2, other.conv2, inside, after)
        repeat_norm(one.norm1, other.norm1, inside)
        repeat_norm(one.norm2, other.norm2, after)
        kept = after
    added = new[len(old) :]
    x = large.groups[: len(old)].eval()(images) if added and images is not None else None
    for number, group in enumerate(added):
        made = copies(group.conv1.in_channels, group.conv1.out_channels, generator)
        x = _pass_through(group, x, made, LINEAR if number == 0 else 0.0)
        kept = kept.then(made)
    widen(small.head, large.head, kept, unchanged(small.head.out_features))
    if added:
        large.head.bias.sub_(LINEAR * large.head.weight.sum(1))


def _whitened(small: SmallCnn, large: SmallCnn, images: Tensor | None) -> Tensor | None:
    """Give `large` the whitening of `small`; return what it makes of the images."""
    if (small.whitening is None) != (large.whitening is None):
        raise ModelError("small_cnn cannot grow with `whiten` in one of the two models alone; give both the same")
    if small.whitening is None or large.whitening is None:
        return images
    large.whitening.load_state_dict(small.whitening.state_dict())
    if images is None:
        return None
    whitened: Tensor = large.whitening(images)
    return whitened


def _pass_through(group: ConvGroup, x: Tensor | None, made: Copies, shift: float) -> Tensor | None:
    """Make a group return the maximum over each 2x2 pixels of its input, plus `shift`; return that of x."""
    copying_conv(group.conv1, made)
    copying_conv(group.conv2, unchanged(group.conv2.in_channels))
    passing_norm(group.norm1, None if x is None else group.pool(group.conv1(x)), "small_cnn", shift)
    if x is None:
        return None
    inside = group.act1(group.norm1.eval()(group.pool(group.conv1(x))))
    passing_norm(group.norm2, group.conv2(inside), "small_cnn")
    y: Tensor = group.eval()(x)
    return y
