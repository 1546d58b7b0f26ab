"""baseline_cnn, wider, with more convolutions, batch norm or a shortcut, as the function of a smaller one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.models.baseline_cnn import BaselineCnn, Extra
from robustkit.models.copied import Copies, copies, copying_conv, passing_norm, repeat_norm, unchanged, widen


@torch.no_grad()
def grow_baseline_cnn(
    small: BaselineCnn, large: BaselineCnn, generator: torch.Generator, images: Tensor | None = None
) -> None:
    """Give `large` weights with which it computes the logits of `small`; both in eval mode, to rounding.

    images: normalized training images (N, C, H, W), on which new batch norms are measured. ReLU returns its own outputs
    unchanged, so new convolutions begin as the identity; a new shortcut begins as zero.

    Raises:
        ModelError: `large` is narrower or shallower, or lacks the batch norm or the shortcut of `small`; or it has new
            batch norms and there are no images.
    """
    _check(small, large)
    large.eval()
    first = copies(small.conv1.out_channels, large.conv1.out_channels, generator)
    second = copies(small.conv2.out_channels, large.conv2.out_channels, generator)
    hidden = copies(small.fc1.out_features, large.fc1.out_features, generator)
    widen(small.conv1, large.conv1, unchanged(small.conv1.in_channels), first)
    x = None if images is None else large.conv1(images)
    _norm(small.norm1, large.norm1, first, x)
    widen(small.conv2, large.conv2, first, second)
    x = None if x is None else large.conv2(large.relu1(large.pool(large.norm1(x))))
    _norm(small.norm2, large.norm2, second, x)
    _shortcut(small, large, first, second)
    x = None if images is None else large.maps(images)
    kept = second
    for number, one in enumerate(large.extra):
        assert isinstance(one, Extra)
        kept = _extra(small, one, number, kept, x, generator)
        x = None if x is None else one(x)
    area = small.fc1.in_features // small.conv2.out_channels
    widen(small.fc1, large.fc1, kept.flattened(area), hidden)
    widen(small.fc2, large.fc2, hidden, unchanged(small.fc2.out_features))


def _check(small: BaselineCnn, large: BaselineCnn) -> None:
    sizes = [
        (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features, len(model.extra))
        for model in (small, large)
    ]
    if any(old > new for old, new in zip(*sizes, strict=True)):
        raise ModelError(
            f"baseline_cnn cannot grow from (widths, hidden, extra) {sizes[0]} to {sizes[1]}: none of them may shrink"
        )
    if small.shortcut is not None and large.shortcut is None:
        raise ModelError("baseline_cnn cannot grow out of its shortcut: keep `residual: true`")
    if isinstance(small.norm1, nn.BatchNorm2d) and not isinstance(large.norm1, nn.BatchNorm2d):
        raise ModelError("baseline_cnn cannot grow out of its batch norm: keep `batch_norm: true`")


def _norm(old: nn.Module, new: nn.Module, outputs: Copies, x: Tensor | None) -> None:
    if isinstance(old, nn.BatchNorm2d) and isinstance(new, nn.BatchNorm2d):
        repeat_norm(old, new, outputs)
    else:
        passing_norm(new, x, "baseline_cnn")


def _shortcut(small: BaselineCnn, large: BaselineCnn, inputs: Copies, outputs: Copies) -> None:
    if large.shortcut is None:
        return
    if small.shortcut is not None:
        widen(small.shortcut, large.shortcut, inputs, outputs)
        return
    for parameter in large.shortcut.parameters():
        parameter.zero_()


def _extra(
    small: BaselineCnn, new: Extra, number: int, inputs: Copies, x: Tensor | None, generator: torch.Generator
) -> Copies:
    """Fill one of the 3x3 convolutions and return the copies that come out of it."""
    if number >= len(small.extra):
        copying_conv(new.conv, unchanged(new.conv.in_channels))
        passing_norm(new.norm, None if x is None else new.conv(x), "baseline_cnn")
        return inputs
    old = small.extra[number]
    assert isinstance(old, Extra)
    outputs = copies(old.conv.out_channels, new.conv.out_channels, generator)
    widen(old.conv, new.conv, inputs, outputs)
    _norm(old.norm, new.norm, outputs, None if x is None else new.conv(x))
    return outputs
