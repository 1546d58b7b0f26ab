"""small_cnn, wider and with residual convolutions, as the function of a smaller one."""

from __future__ import annotations

import torch

from robustkit.errors import ModelError
from robustkit.models.copied import Copies, copies, repeat_norm, unchanged, widen
from robustkit.models.small_cnn import ConvGroup, Residual, SmallCnn


@torch.no_grad()
def grow_small_cnn(small: SmallCnn, large: SmallCnn, generator: torch.Generator) -> None:
    """Give `large` weights with which it computes the logits of `small`, to rounding, in train mode as well.

    GELU is not the identity of its own outputs, as ReLU is, so new layers stand beside a shortcut and begin as zero
    (Goyal et al. 2017, arXiv 1706.02677, section 5.1).

    Raises:
        ModelError: `large` has another number of groups, a narrower one, or fewer residual convolutions; one of the two
            alone whitens.
    """
    _whiten_alike(small, large)
    old, new = _groups(small), _groups(large)
    widths = [[group.conv1.out_channels for group, _ in groups] for groups in (old, new)]
    if len(old) != len(new) or any(before > after for before, after in zip(*widths, strict=False)):
        raise ModelError(
            f"small_cnn cannot grow from widths {widths[0]} to {widths[1]}: as many groups, none of them narrower"
        )
    if len(old[0][1]) > len(new[0][1]):
        raise ModelError(f"small_cnn cannot grow from extra {len(old[0][1])} to {len(new[0][1])}: no fewer than before")
    kept = unchanged(old[0][0].conv1.in_channels)
    for (one, before), (other, behind) in zip(old, new, strict=True):
        inside = copies(one.conv1.out_channels, other.conv1.out_channels, generator)
        after = copies(one.conv2.out_channels, other.conv2.out_channels, generator)
        widen(one.conv1, other.conv1, kept, inside)
        widen(one.conv2, other.conv2, inside, after)
        repeat_norm(one.norm1, other.norm1, inside)
        repeat_norm(one.norm2, other.norm2, after)
        _extras(before, behind, after)
        kept = after
    widen(small.head, large.head, kept, unchanged(small.head.out_features))


def _whiten_alike(small: SmallCnn, large: SmallCnn) -> None:
    if (small.whitening is None) != (large.whitening is None):
        raise ModelError("small_cnn cannot grow with `whiten` in one of the two models alone; give both the same")
    if small.whitening is not None and large.whitening is not None:
        large.whitening.load_state_dict(small.whitening.state_dict())


def _groups(model: SmallCnn) -> list[tuple[ConvGroup, list[Residual]]]:
    """Return each group with the residual convolutions behind it."""
    found: list[tuple[ConvGroup, list[Residual]]] = []
    for module in model.groups:
        if isinstance(module, ConvGroup):
            found.append((module, []))
        elif isinstance(module, Residual):
            found[-1][1].append(module)
    return found


def _extras(old: list[Residual], new: list[Residual], channels: Copies) -> None:
    for one, other in zip(old, new, strict=False):
        # Their outputs are added to their inputs, so both are copied alike.
        widen(one.conv, other.conv, channels, channels)
        repeat_norm(one.norm, other.norm, channels)
    for other in new[len(old) :]:
        other.norm.weight.zero_()
        other.norm.bias.zero_()
