"""DropBlock, dropout of channels and stochastic depth: where they go, how much they drop, gone afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustkit import registry
from robustkit.defenses.drop_block import DropBlock, DropBlockLayer, block_mask, drop_block
from robustkit.defenses.dropout import Dropout, Dropout2d
from robustkit.defenses.stochastic_depth import StochasticDepth, branch_ends, skip_chances
from robustkit.defenses.surgery import attached
from robustkit.errors import ModelError, UsageError
from robustkit.models.build import build_model
from robustkit.recipe.spec import Use
from robustkit.train.hooks import Defense

SHAPE = (3, 32, 32)
BLOCKS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"width": 4}, 8),
    "wide_resnet": ({"depth": 10, "width": 1}, 3),
    "baseline_cnn": ({"residual": True, "batch_norm": True}, 1),
    "torchvision.resnet18": ({}, 8),
    "torchvision.resnet50": ({}, 16),
}
LAYERS: dict[str, Callable[[], Defense]] = {
    "dropout2d": lambda: Dropout2d(0.5),
    "drop_block": lambda: DropBlock(0.3, 3),
    "stochastic_depth": lambda: StochasticDepth(0.9),
}


def build(name: str, **parameters: object) -> nn.Module:
    torch.manual_seed(0)
    use = Use(name=name, parameters=parameters, label=name)
    return build_model(use, shape=SHAPE, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_in_while_training_and_gone_afterwards(name: str) -> None:
    model = build("resnet18", width=4)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    keys, names = list(model.state_dict()), [module for module, _ in model.named_modules()]
    expected = model.eval()(x)
    model = LAYERS[name]().prepare_model(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model.eval()(x), expected)
    for layer in attached(model, name):
        layer.train()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, expected)
    torch.manual_seed(0)
    assert torch.equal(model(x), first), "not drawn by torch's generator alone"
    for one in (copy.deepcopy(model), model):
        restored = LAYERS[name]().restore_model(one).eval()
        assert [module for module, _ in restored.named_modules()] == names
        assert torch.equal(restored(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_twice_is_refused_and_beside_dropout_is_not(name: str) -> None:
    model = build("resnet18", width=4)
    for defense in (LAYERS[name](), Dropout(p=0.1, conv=0.1) if name != "dropout2d" else DropBlock()):
        model = defense.prepare_model(model)
    with pytest.raises(UsageError, match="already"):
        LAYERS[name]().prepare_model(model)


@pytest.mark.parametrize("defense", [Dropout2d(), DropBlock()])
def test_a_model_without_convolutions_is_refused(defense: Defense) -> None:
    with pytest.raises(UsageError, match="no convolution"):
        defense.prepare_model(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_blocks_by_hand() -> None:
    centres = torch.zeros(1, 1, 3, 2)
    centres[0, 0, 1, 0] = 1
    assert block_mask(centres, 2)[0, 0].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.3), st.integers(1, 9), st.integers(0, 2**31))
def test_kept_values_are_scaled_to_the_mean(p: float, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    found = drop_block(torch.ones(16, 4, 6, 7), p, size)
    kept = found != 0
    if kept.any():
        torch.testing.assert_close(found.mean(), torch.tensor(1.0))
        torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / float(kept.float().mean())))


@pytest.mark.parametrize("size", [1, 3])
def test_about_a_share_p_is_dropped(size: int) -> None:
    torch.manual_seed(0)
    dropped = (drop_block(torch.ones(64, 16, 14, 14), 0.1, size) == 0).float().mean()
    # Squares overlap, so that a little less than p is dropped.
    assert 0.08 < float(dropped) < 0.105


def test_drop_block_keeps_precision_and_p_0_changes_nothing() -> None:
    x = torch.rand(2, 3, 4, 4).to(torch.bfloat16)
    assert drop_block(x, 0.2, 2).dtype == torch.bfloat16
    assert DropBlockLayer(0.0, 2).train()(x) is x


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks_are_found(name: str) -> None:
    parameters, count = BLOCKS[name]
    assert len(branch_ends(build(name, **parameters))) == count


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet", "baseline_cnn", "torchvision.resnet18"])
def test_a_skipped_branch_leaves_the_shortcut(name: str) -> None:
    """With every branch skipped the model computes what it does with its branches' ends set to zero."""
    model = build(name, **BLOCKS[name][0]).eval()
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    handles = [end.register_forward_hook(lambda _m, _i, output: output * 0) for end in branch_ends(model)]
    expected = model(x)
    for handle in handles:
        handle.remove()
    skipped = StochasticDepth(0.5).prepare_model(model)
    for layer in attached(skipped, "stochastic_depth"):
        layer.train()
        layer.p = 1.0  # type: ignore[assignment]
    torch.testing.assert_close(skipped(x), expected)


def test_chances_grow_linearly() -> None:
    assert skip_chances(4, 0.2) == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("name", ["small_cnn", "baseline_cnn"])
def test_a_model_without_blocks_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"no residual block; use resnet18"):
        StochasticDepth().prepare_model(build(name))


def test_p_1_is_refused_when_the_recipe_is_checked() -> None:
    """The last block would never be trained."""
    _, problems = registry.check_parameters(registry.find("defense", "stochastic_depth"), {"p": 1.0})
    assert "less than 1" in problems[0][1]
