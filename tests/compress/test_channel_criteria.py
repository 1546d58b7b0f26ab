"""What a channel scores, against sums by hand; every method drops the same channels in all coupled layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustkit.attacks.threat import Threat
from robustkit.compress.channel_criteria import (
    ChannelBnScale,
    ChannelFpgm,
    ChannelL1,
    ChannelRandom,
    ChannelTaylor,
    bn_scale_score,
    channel_taylor_score,
    fpgm_score,
    l1_score,
)
from robustkit.compress.channels import ChannelGroup, ChannelPruning, channel_groups, dead_channels
from robustkit.compress.criteria import taylor_products
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import Masks
from robustkit.compress.shrink import largest_difference, shrink
from robustkit.data.split import split_of
from robustkit.models.resnet import ResNet

THREAT = Threat("linf", 0.1)
EXAMPLE = torch.zeros(2, 1, 8, 8)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def only_group(model: nn.Module) -> ChannelGroup:
    (group,) = channel_groups(model, EXAMPLE)
    return group


def filters(model: nn.Sequential) -> Tensor:
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def test_l1_is_the_sum_of_absolute_weights_over_coupled_layers() -> None:
    model = plain()
    assert torch.allclose(l1_score(only_group(model), Masks()), filters(model).abs().sum(1))
    residual = ResNet((1, 8, 8), 10, (1,), 4)
    group = next(one for one in channel_groups(residual, EXAMPLE) if one.name == "conv1")
    block = residual.blocks[0].conv2
    assert isinstance(block, nn.Conv2d)
    wanted = residual.conv1.weight.flatten(1).abs().sum(1) + block.weight.flatten(1).abs().sum(1)
    assert torch.allclose(l1_score(group, Masks()), wanted)


def test_fpgm_is_the_distance_to_all_other_filters_that_are_left() -> None:
    model = plain()
    rows = filters(model)
    wanted = [sum(float((one - other).norm()) for other in rows) for one in rows]
    assert fpgm_score(only_group(model), Masks()).tolist() == pytest.approx(wanted, rel=1e-5)
    mask = torch.ones_like(model[0].weight)  # type: ignore[arg-type]
    mask[2] = 0
    wanted = [sum(float((rows[a] - rows[b]).norm()) for b in (0, 1, 3)) if a != 2 else 0.0 for a in range(4)]
    assert fpgm_score(only_group(model), Masks({"0.weight": mask})).tolist() == pytest.approx(wanted, rel=1e-5)


def test_bn_scale_is_gamma_and_without_batch_norm_the_l1_norm() -> None:
    model = plain()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))  # type: ignore[operator,union-attr]
    assert bn_scale_score(only_group(model), Masks()).tolist() == pytest.approx([0.5, 2.0, 0.1, 1.0])
    bare = nn.Sequential(model[0], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert torch.allclose(bn_scale_score(only_group(bare), Masks()), filters(model).abs().sum(1))


def test_taylor_is_the_slope_of_the_loss_in_the_channels_scale() -> None:
    """The sum of w dL/dw over a filter is the derivative of the loss in a factor before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    found = channel_taylor_score(only_group(model), Masks(), taylor_products(model, [(x[:3], y[:3]), (x[3:], y[3:])]))
    factor = torch.ones(4, requires_grad=True)
    first = nn.functional.conv2d(x, model[0].weight * factor[:, None, None, None])  # type: ignore[operator]
    loss = functional.cross_entropy(model[1:](first), y)
    (slope,) = torch.autograd.grad(loss, factor)
    assert torch.allclose(found, slope.square(), atol=1e-7)


@pytest.mark.parametrize("kind", [ChannelL1, ChannelFpgm, ChannelBnScale, ChannelTaylor, ChannelRandom])
def test_every_method_prunes_whole_groups_that_shrink_removes(kind: type[ChannelPruning]) -> None:
    drawn = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    train = split_of(drawn, torch.arange(20) % 10)

    def pruned(share: float, model: nn.Module, inherit: bool) -> nn.Module:
        held = MaskKeeper([kind(share)], inherit=inherit, context_seed=0, example=EXAMPLE, threat=THREAT, train=train)
        return held.finish(held.compress(model))

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(pruned(0.25, ResNet((1, 8, 8), 10, (1, 1), 8), False).eval())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    model = pruned(0.5, models[0], True)
    assert all(2 * dead == width for _, dead, width in dead_channels(model, EXAMPLE)), "the total, over what was dead"
    small = shrink(model, EXAMPLE).model
    assert largest_difference(model, small, torch.rand(4, 1, 8, 8)) < 1e-5
    assert sorted(width for _, _, width in dead_channels(small, EXAMPLE)) == [4, 4, 8, 8]
