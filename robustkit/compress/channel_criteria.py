"""Channel pruning by other criteria than the L2 norm; the same channels in every coupled layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.compress.channels import WEIGHTED, ChannelGroup, ChannelL2, ChannelPruning, Member
from robustkit.compress.criteria import taylor_products
from robustkit.compress.masks import Masks
from robustkit.compress.scored import batches_of
from robustkit.models.widths import NORMS
from robustkit.params import PositiveInt


def l1_score(group: ChannelGroup, current: Masks) -> Tensor:
    """Return the L1 norm (width,) of each channel's incoming weights over all coupled layers (Li et al. 2017).

    arXiv 1608.08710, section 3.1.
    """
    total = torch.zeros(group.width)
    for member in _weighted(group):
        _add(total, member, _kept(member, current).abs().flatten(1).sum(1))
    return total


def fpgm_score(group: ChannelGroup, current: Masks) -> Tensor:
    """Return each channel's summed distance (width,) to all filters of its layers (He et al. 2019, FPGM).

    arXiv 1811.00250, eq. 4: the filters closest to the geometric median say least that others do not say. Channels
    that are dropped already score 0.
    """
    total = torch.zeros(group.width)
    for member in _weighted(group):
        filters = _kept(member, current).flatten(1)
        live = filters.abs().amax(1) > 0
        # A dropped filter says nothing that another one could repeat.
        distances = torch.cdist(filters[None], filters[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
        _add(total, member, (distances * live).sum(1) * live)
    return total


def bn_scale_score(group: ChannelGroup, current: Masks) -> Tensor:
    """Return the summed |gamma| (width,) of each channel's batch norms (Liu et al. 2017, network slimming).

    arXiv 1708.06519, section 3. A group without batch norm is scored by the L1 norm of its weights.
    """
    norms = [member for member in group.members if isinstance(member.module, NORMS) and member.module.affine]
    if not norms:
        return l1_score(group, current)
    total = torch.zeros(group.width)
    for member in norms:
        _add(total, member, _kept(member, current).abs())
    return total


def channel_taylor_score(group: ChannelGroup, current: Masks, weights: dict[str, Tensor]) -> Tensor:
    """Return (sum of w dL/dw)^2 (width,) of each channel, summed over the coupled layers (Molchanov et al. 2019).

    `weights` holds w dL/dw by parameter name, gradients averaged over training images.
    """
    total = torch.zeros(group.width)
    for member in _weighted(group):
        products = weights[f"{member.name}.weight"]
        _add(total, member, (products * current.of(f"{member.name}.weight", products)).flatten(1).sum(1).square())
    return total


def _weighted(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if isinstance(member.module, WEIGHTED)]


def _kept(member: Member, current: Masks) -> Tensor:
    weight = member.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() * current.of(f"{member.name}.weight", weight.detach())


def _add(total: Tensor, member: Member, values: Tensor) -> None:
    total.index_add_(0, member.channel, values.float().cpu()[member.local])


@dataclass(frozen=True)
class ChannelL1(ChannelPruning):
    """Prune the channels of the smallest L1 norm, the same ones in all coupled layers (Li et al. 2017)."""

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the L1 norms."""
        return l1_score(group, current)


@dataclass(frozen=True)
class ChannelFpgm(ChannelPruning):
    """Prune the channels closest to the geometric median of their layer: others say the same (He et al. 2019)."""

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the summed distances."""
        return fpgm_score(group, current)


@dataclass(frozen=True)
class ChannelBnScale(ChannelPruning):
    """Prune the channels of the smallest batch-norm scale (Liu et al. 2017); train the parent with `l1` for it."""

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the summed |gamma|."""
        return bn_scale_score(group, current)


@dataclass(frozen=True)
class ChannelRandom(ChannelPruning):
    """Prune random channels: the control that every criterion must beat."""

    def prepare(self, model: nn.Module, context: CompressContext) -> dict[str, Tensor]:
        """Draw a number for each output of each layer, by its name."""
        return {
            name: torch.rand(module.weight.shape[0], generator=context.generator)
            for name, module in model.named_modules()
            if isinstance(module, WEIGHTED)
        }

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return what was drawn for the group's first layer; 0 for channels that are dropped already."""
        first = _weighted(group)[0]
        total = torch.zeros(group.width)
        _add(total, first, prepared[first.name])
        return total * (l1_score(group, current) > 0)


@dataclass(frozen=True)
class ChannelTaylor(ChannelPruning):
    """Prune the channels whose loss changes least without them, to first order (Molchanov et al. 2019)."""

    examples: PositiveInt = 512
    batch_size: PositiveInt = 64

    def prepare(self, model: nn.Module, context: CompressContext) -> dict[str, Tensor]:
        """Return w dL/dw of every weight on training images."""
        return taylor_products(model, batches_of(context, self.examples, self.batch_size))

    def score(self, group: ChannelGroup, current: Masks, prepared: dict[str, Tensor]) -> Tensor:
        """Return the squared sums."""
        return channel_taylor_score(group, current, prepared)


CHANNEL_METHODS: dict[str, type[ChannelPruning]] = {
    "channel_l1": ChannelL1,
    "channel_l2": ChannelL2,
    "channel_fpgm": ChannelFpgm,
    "channel_bn_scale": ChannelBnScale,
    "channel_taylor": ChannelTaylor,
    "channel_random": ChannelRandom,
}
