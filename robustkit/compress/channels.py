"""Channel pruning: the same channels in every coupled layer, batch norm and biases included."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.utils import prune

from robustkit.compress.base import CompressContext
from robustkit.compress.masks import Masks
from robustkit.errors import ModelError
from robustkit.models.widths import NORMS, is_depthwise, width_of
from robustkit.params import Fraction, PositiveInt, Schedule

WEIGHTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Member:
    """A layer of a group: its output (or, of a reader, input) positions `local` hold the channels `channel`."""

    name: str
    module: nn.Module
    local: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Layers whose output channels can only go together (residual sums, batch norm, depthwise)."""

    width: int
    members: tuple[Member, ...]
    readers: tuple[Member, ...] = ()
    """Layers that take the channels in."""
    others: tuple[str, ...] = ()
    """What else is as wide as the channels, and cannot be narrowed here (layer norms, parameters of their own)."""

    @property
    def name(self) -> str:
        """The first layer's name."""
        return self.members[0].name


def channel_groups(model: nn.Module, example: Tensor) -> Iterator[ChannelGroup]:
    """Yield the groups of a model, found by tracing it on `example` (N, C, H, W); the classifier is left out.

    Source: Fang et al. 2023, DepGraph (arXiv 2301.12900), through torch-pruning.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        # The tracer follows autograd, so it needs gradients on and every parameter in the graph.
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(model.eval(), example)
        names: dict[object, str] = {module: name for name, module in model.named_modules()}
        names |= {parameter: name for name, parameter in model.named_parameters()}
        ignored = [classifier(model)]
        for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=list(WEIGHTED)):
            found = _group(group, graph, names)
            if found.members:
                yield found
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


def _group(group: object, graph: object, names: Mapping[object, str]) -> ChannelGroup:
    members, readers, others = [], [], []
    for item in group:  # type: ignore[attr-defined]
        module = item.dep.target.module
        if module not in names:
            # An operation without weights: a sum, a concatenation, a reshape.
            continue
        outputs = graph.is_out_channel_pruning_fn(item.dep.handler)  # type: ignore[attr-defined]
        member = Member(names[module], module, torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs)))
        if isinstance(module, NORMS) and not module.affine:
            # It has nothing to mask: of a channel of zeros it makes whatever its running mean says.
            others.append(names[module])
        elif outputs and isinstance(module, (*WEIGHTED, *NORMS)):
            members.append(member)
        elif isinstance(module, WEIGHTED):
            readers.append(member)
        elif isinstance(module, nn.Parameter) or any(True for _ in module.parameters()):
            others.append(names[module])
    return ChannelGroup(len(group[0].idxs), tuple(members), tuple(readers), tuple(others))  # type: ignore[index]


def classifier(model: nn.Module) -> nn.Module:
    """Return the last linear (or convolution) layer, whose outputs are the classes."""
    weighted = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    if not weighted:
        raise ModelError("the model has no convolution and no linear layer to prune")
    return weighted[-1]


def group_score(group: ChannelGroup, current: Masks) -> Tensor:
    """Return the L2 norm (width,) of each channel's incoming weights over all coupled layers, as they are masked."""
    total = torch.zeros(group.width)
    for member in group.members:
        if isinstance(member.module, WEIGHTED):
            weight = member.module.weight.detach()
            kept = weight * current.of(f"{member.name}.weight", weight)
            norms = kept.flatten(1).square().sum(1).cpu()
            total.index_add_(0, member.channel, norms[member.local])
    return total.sqrt()


def blocks_of(group: ChannelGroup) -> Tensor:
    """Return which block (width,) each channel belongs to: a grouped convolution loses equally many of each.

    All are in block 0 without a grouped convolution, and where several of them cut the channels into unequal blocks.
    """
    label = torch.zeros(group.width, dtype=torch.int64)
    for members, outputs in ((group.members, True), (group.readers, False)):
        for member in members:
            parts = parts_of(member.module)
            if parts > 1:
                width = width_of(member.module)
                size = (width.outputs if outputs else width.inputs) // parts
                finer = label.clone()
                finer[member.channel] = label[member.channel] * parts + member.local // size
                label = finer.unique(return_inverse=True)[1]
    sizes = label.bincount()
    return label if bool((sizes == sizes[0]).all()) else torch.zeros_like(label)


def parts_of(module: nn.Module) -> int:
    """Return the groups of a convolution; 1 for a depthwise one, which loses whole groups, and for other layers."""
    return module.groups if isinstance(module, nn.Conv2d) and not is_depthwise(module) else 1


def dropped_of(sparsity: float, width: int, blocks: int = 1) -> int:
    """Return how many of a group's channels go: equally many of each block, of which at least one is kept."""
    size = width // blocks
    return blocks * min(round(sparsity * size), size - 1)


def channel_masks(model: nn.Module, current: Masks, sparsity: float, example: Tensor) -> Masks:
    """Return masks that drop round(sparsity * width) channels of every group, at least one kept.

    Of a grouped convolution's channels it is so many of each of its groups.
    """
    return group_masks(channel_groups(model, example), current, sparsity)


Score = Callable[[ChannelGroup, Masks], Tensor]
"""(group, what is masked already) -> importance (width,); dead channels score 0, none less."""


def group_masks(
    groups: Iterable[ChannelGroup], current: Masks, sparsity: float, score_of: Score = group_score
) -> Masks:
    """Return masks that drop the round(sparsity * width) channels of the lowest scores, at least one of each kept."""
    found: dict[str, Tensor] = {}
    for group in groups:
        keep = _kept(score_of(group, current), blocks_of(group), sparsity)
        for member in group.members:
            for name, mask in _member_masks(member, keep):
                found[name] = found[name] * mask if name in found else mask
    return current.narrowed(found)


def _kept(score: Tensor, block: Tensor, sparsity: float) -> Tensor:
    """Return ones (width,) for the channels of the highest scores of each block, zeros for the others."""
    rows = block.argsort(stable=True).view(int(block.amax()) + 1, -1)
    method = prune.LnStructured(amount=dropped_of(sparsity, rows.shape[1]), n=1, dim=0)
    keep = torch.ones_like(score)
    for row in rows:
        keep[row] = method.compute_mask(score[row][:, None], torch.ones(len(row), 1))[:, 0]
    return keep


def _member_masks(member: Member, keep: Tensor) -> Iterator[tuple[str, Tensor]]:
    weight, bias = member.module.weight, member.module.bias
    assert isinstance(weight, Tensor)
    rows = torch.ones(weight.shape[0])
    rows[member.local] = keep[member.channel]
    rows = rows.to(weight.device, weight.dtype)
    yield f"{member.name}.weight", rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight).clone()
    if isinstance(bias, Tensor):
        yield f"{member.name}.bias", rows.clone()


def _asked(group: ChannelGroup, sparsity: float) -> int:
    return dropped_of(sparsity, group.width, int(blocks_of(group).amax()) + 1)


def dead_channels(model: nn.Module, example: Tensor) -> list[tuple[str, int, int]]:
    """Return (group, dead, width): channels whose weights, biases and norms are zero in every coupled layer."""
    return [(group.name, count_dead(group), group.width) for group in channel_groups(model, example)]


def count_dead(group: ChannelGroup) -> int:
    """Return how many channels of a group are zero in all of its layers."""
    return int(dead_of(group).sum())


def dead_of(group: ChannelGroup) -> Tensor:
    """Return which channels (width,) of a group are zero in all of its layers: weights, biases and norms."""
    dead = torch.ones(group.width, dtype=torch.bool)
    for member in group.members:
        weight, bias = member.module.weight, member.module.bias
        assert isinstance(weight, Tensor)
        zero = weight.detach().flatten(1).abs().amax(1) == 0 if weight.dim() > 1 else weight.detach() == 0
        if isinstance(bias, Tensor):
            zero = zero & (bias.detach() == 0)
        dead[member.channel] &= zero.cpu()[member.local]
    return dead


@dataclass(frozen=True)
class ChannelPruning:
    """Base of the methods that only differ in what a channel scores."""

    sparsity: Fraction
    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 10

    def prepare(self, model: nn.Module, context: CompressContext) -> dict[str, Tensor]:
        """Return what the scores of all groups need, by name of layer or parameter."""
        return {}

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the importance (width,) of a group's channels, none below 0."""
        raise NotImplementedError

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks that drop this share of every group's channels.

        Raises:
            ModelError: more of them are zero already than the final sparsity asks for.
        """
        groups = list(channel_groups(model, context.example))
        dead = {group.name: dead_of(group) for group in groups}
        for group in groups:
            count = int(dead[group.name].sum())
            if count > _asked(group, self.sparsity) and self.sparsity < 1:
                raise ModelError(
                    f"{count} of {group.width} channels of {group.name} are zero already; sparsity is the total, and "
                    f"{self.sparsity:.1%} is less than that"
                )
        prepared = self.prepare(model, context)

        def scored(group: ChannelGroup, held: Masks) -> Tensor:
            score = self.score(group, held, prepared)
            # A live channel may score 0 as well; what is dead goes first.
            return score.clamp_min(torch.finfo(score.dtype).tiny) * ~dead[group.name]

        return group_masks(groups, current, sparsity, scored)

    def reached(self, model: nn.Module, context: CompressContext) -> float:
        """Return the share of channels that are zero, over all groups."""
        found = dead_channels(model, context.example)
        return sum(dead for _, dead, _ in found) / max(1, sum(width for _, _, width in found))

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check that each group has as many zero channels as asked for; weights pruned singly may leave more."""
        label = re.sub("(?<=.)(?=[A-Z])", "_", type(self).__name__).lower()
        for group in channel_groups(model, context.example):
            dead, wanted = count_dead(group), _asked(group, self.sparsity)
            if dead < wanted:
                what = f"{dead} of {group.width} channels of {group.name} are zero"
                raise ModelError(f"{label}: {what}, {wanted} were asked for")


@dataclass(frozen=True)
class ChannelL2(ChannelPruning):
    """Prune the channels of the smallest L2 norm, the same ones in all coupled layers (Li et al. 2017)."""

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the L2 norms."""
        return group_score(group, current)
