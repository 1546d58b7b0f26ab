"""Channels really removed: those that are zero in every coupled layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.compress.channels import ChannelGroup, Member, channel_groups, dead_of, parts_of
from robustkit.errors import ModelError
from robustkit.models.widths import Width, narrow, note_widths, width_of

TOLERANCE = 1e-4
"""How far logits of the shrunk model may be from those of the masked one, for logits up to 1 (else relative)."""
IMAGES = 128


@dataclass(frozen=True)
class Shrunk:
    """A smaller model that computes the same. `kept`: why dead channels of a group could not be removed."""

    model: nn.Module
    removed: dict[str, int]
    kept: dict[str, str]


def shrink(model: nn.Module, example: Tensor) -> Shrunk:
    """Return a copy without the channels that are zero in every coupled layer (Fang et al. 2023, arXiv 2301.12900).

    `example` (N, C, H, W) is what the dependency graph is traced on. The model itself is left alone. Of a layer
    whose channels are all dead one stays.
    """
    small = copy.deepcopy(model)
    plan = _Plan()
    removed: dict[str, int] = {}
    kept: dict[str, str] = {}
    for group in channel_groups(small, example):
        dead = dead_of(group)
        gone = removable(group, dead)
        count, left = int(gone.sum()), int((dead & ~gone).sum())
        if count:
            removed[group.name] = count
            plan.add(group, gone)
        if left:
            kept[group.name] = f"{left} of {group.width} dead channels of {group.name} stay: {_reason(group)}"
    note_widths(small, plan.carry_out(small))
    return Shrunk(small, removed, kept)


def removable(group: ChannelGroup, dead: Tensor) -> Tensor:
    """Return which of the dead channels (width,) can go: not all, and equally many from each group of a convolution."""
    if group.others:
        return torch.zeros_like(dead)
    gone = dead.clone()
    if bool(gone.all()):
        gone[0] = False
    grouped = [(one, width_of(one.module).outputs) for one in group.members if parts_of(one.module) > 1]
    grouped += [(one, width_of(one.module).inputs) for one in group.readers if parts_of(one.module) > 1]
    for _ in grouped:
        for member, size in grouped:
            gone = _evened(member, size, gone)
    return gone


def _evened(member: Member, size: int, gone: Tensor) -> Tensor:
    """Return as many of each convolution group's channels as every one of its groups can lose."""
    local = torch.zeros(size, dtype=torch.int64)
    local[member.local] = gone[member.channel].long()
    rows = local.view(parts_of(member.module), -1)
    fewest = rows.sum(1).amin()
    rows = rows * (rows.cumsum(1) <= fewest)
    evened = gone.clone()
    evened[member.channel] &= rows.flatten()[member.local].bool()
    return evened


def _reason(group: ChannelGroup) -> str:
    if group.others:
        return f"{', '.join(group.others)} cannot be narrowed"
    if any(parts_of(one.module) > 1 for one in (*group.members, *group.readers)):
        return "a grouped convolution must lose equally many channels of each of its groups"
    return "a layer keeps one channel"


class _Plan:
    """Which input and output channels each layer loses; carried out at once, so that positions stay valid."""

    def __init__(self) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def add(self, group: ChannelGroup, gone: Tensor) -> None:
        """Note the channels (width,) that a group loses."""
        for members, side in ((group.members, self._outputs), (group.readers, self._inputs)):
            for member in members:
                width = width_of(member.module)
                self._modules[member.name] = member.module
                size = width.outputs if side is self._outputs else width.inputs
                lost = side.setdefault(member.name, torch.zeros(size, dtype=torch.bool))
                lost[member.local] |= gone[member.channel]

    def carry_out(self, model: nn.Module) -> dict[str, Width]:
        """Narrow the layers and return their new widths."""
        for name, module in self._modules.items():
            width = width_of(module)
            nothing = torch.zeros(width.inputs, dtype=torch.bool)
            inputs = ~self._inputs.get(name, nothing)
            outputs = ~self._outputs.get(name, torch.zeros(width.outputs, dtype=torch.bool))
            narrow(module, inputs.nonzero().flatten(), outputs.nonzero().flatten())
        return {name: width_of(module) for name, module in self._modules.items()}


@torch.no_grad()
def largest_difference(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two models' logits on images (N, C, H, W), over the largest logit if above 1.

    Both are compared in eval mode and keep their own modes.
    """
    logits = []
    for one in (model, other):
        modes = {module: module.training for module in one.modules()}
        logits.append(one.eval()(images).float())
        for module, mode in modes.items():
            module.training = mode
    scale = max(1.0, float(logits[0].abs().max()))
    return float((logits[0] - logits[1]).abs().max()) / scale


@dataclass(frozen=True)
class Shrink:
    """Remove the channels that are zero in every coupled layer, after training; checked (Fang et al. 2023)."""

    def finish(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the smaller model.

        Raises:
            ModelError: it computes something else than the masked one on training images.
        """
        small = shrink(model, context.example)
        images, _ = context.batch(IMAGES)
        try:
            apart = largest_difference(model, small.model, images)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"shrink: the model cannot be narrowed, its forward needs the old widths: {error}"
            ) from error
        if not apart <= TOLERANCE:
            raise ModelError(
                f"shrink: the shrunk model's logits are {apart:.2g} from the masked one's ({TOLERANCE:g} is allowed): "
                "a layer makes something of channels that are zero; drop `shrink`, the masks alone are exact"
            )
        for line in _told(small, apart):
            context.note(line)
        return small.model


def _told(small: Shrunk, apart: float) -> list[str]:
    if not small.removed:
        first = "shrink: no channel is zero in every coupled layer, so nothing was removed"
    else:
        count = sum(small.removed.values())
        first = f"shrink: {count} channels removed; logits within {apart:.1e} of the masked model's"
    return [first, *(f"shrink: {reason}" for reason in small.kept.values())]
