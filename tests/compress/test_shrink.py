"""Channels really removed: the same logits, smaller layers, files that tell their widths."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.cli.group import run as cli
from robustkit.compress.base import CompressContext
from robustkit.compress.channels import channel_groups, channel_masks
from robustkit.compress.costs import count_macs
from robustkit.compress.masks import Masks
from robustkit.compress.shrink import Shrink, largest_difference, shrink
from robustkit.data.split import split_of
from robustkit.errors import ModelError
from robustkit.models.artefact import load_model, save_model
from robustkit.models.build import build_model
from robustkit.models.normalized import Normalized
from robustkit.models.widths import Width, widths_of
from robustkit.recipe.spec import Use

Shape = tuple[int, int, int]
CLASSES = tuple("0123456789")
SMALL: dict[str, tuple[dict[str, Any], Shape]] = {
    "baseline_cnn": ({"residual": True, "batch_norm": True}, (1, 16, 16)),
    "small_cnn": ({"widths": [8, 16]}, (1, 8, 8)),
    "resnet18": ({"width": 8}, (3, 16, 16)),
    "wide_resnet": ({"depth": 10, "width": 1}, (3, 16, 16)),
}
LARGE: dict[str, tuple[dict[str, Any], Shape]] = {
    "torchvision.mobilenet_v2": ({}, (3, 32, 32)),
    "torchvision.densenet121": ({}, (3, 32, 32)),
    "torchvision.vgg11_bn": ({}, (3, 32, 32)),
    "torchvision.efficientnet_b0": ({}, (3, 32, 32)),
    "torchvision.regnet_y_400mf": ({}, (3, 32, 32)),
}
EVERY = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


def made(name: str) -> tuple[Normalized, Shape]:
    """A model whose batch norms have seen something: statistics and affine values away from 0 and 1."""
    parameters, shape = (SMALL | LARGE)[name]
    torch.manual_seed(0)
    use = Use(name=name, parameters=parameters, label=name)
    model = build_model(use, shape=shape, classes=10, mean=[0.4] * shape[0], std=[0.3] * shape[0]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model, shape


def masked(model: nn.Module, shape: Shape, share: float = 0.5) -> None:
    channel_masks(model, Masks(), share, torch.zeros(2, *shape)).apply_(model)


def context(shape: Shape, notes: list[str] | None = None) -> CompressContext:
    images = torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return CompressContext(
        torch.zeros(2, *shape),
        torch.Generator().manual_seed(0),
        Threat("linf", 0.1),
        split_of(images, torch.arange(8)),
        (notes if notes is not None else []).append,
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_shrunk_model_computes_the_same_and_its_file_rebuilds_it(name: str, tmp_path: Path) -> None:
    model, shape = made(name)
    masked(model, shape)
    before = copy.deepcopy(model.state_dict())
    notes: list[str] = []
    small = Shrink().finish(model, context(shape, notes))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "left alone"
    x = torch.rand(4, *shape)
    assert largest_difference(model, small, x) < 1e-5
    dead = sum(module.weight.shape[0] for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    left = sum(module.weight.shape[0] for module in small.modules() if isinstance(module, nn.BatchNorm2d))
    if dead:
        assert left / dead == pytest.approx(0.5, abs=0.02)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    assert count_macs(small, shape) < 0.6 * count_macs(model, shape)
    use = Use(name=name, parameters=(SMALL | LARGE)[name][0], label=name)
    save_model(small, tmp_path / "m.safetensors", use, shape=shape, classes=CLASSES)
    loaded = robustkit.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), small.eval()(x))
    assert widths_of(loaded) == widths_of(small)
    small.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_exactly_the_dead_channels_go() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.ReLU(), nn.Linear(6, 10)
    )
    with torch.no_grad():
        model[0].weight[[1, 3]] = 0  # type: ignore[index,operator]
        model[0].bias[[1]] = 0  # type: ignore[index,operator]
        model[3].weight[[0, 5]] = 0  # type: ignore[index,operator]
        model[3].bias[[0, 5]] = 0  # type: ignore[index,operator]
    found = shrink(model, torch.zeros(2, 1, 8, 8))
    assert found.removed == {"0": 1, "3": 2}, "channel 3 of the convolution has a bias and says something"
    small = found.model
    assert torch.equal(small[0].weight, model[0].weight[[0, 2, 3]])  # type: ignore[index]
    columns = torch.arange(144).view(4, 36)[[0, 2, 3]].flatten()
    assert torch.equal(small[3].weight, model[3].weight[1:5][:, columns])  # type: ignore[index]
    assert torch.equal(small[5].weight, model[5].weight[:, 1:5])  # type: ignore[index]
    assert widths_of(small) == {
        "0": Width(inputs=1, outputs=3),
        "3": Width(inputs=108, outputs=4),
        "5": Width(inputs=4, outputs=10),
    }


def test_a_layer_that_is_all_dead_keeps_one_channel_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    found = shrink(model, torch.zeros(2, 1, 8, 8))
    assert found.removed == {"0": 3}
    assert found.kept == {"0": "1 of 4 dead channels of 0 stay: a layer keeps one channel"}


class Grouped(nn.Module):
    """A convolution of two groups between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.last = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.grouped(self.first(x).relu()).relu().flatten(1))
        return y


def test_a_grouped_convolution_loses_equally_many_of_each_group() -> None:
    torch.manual_seed(0)
    model = Grouped()
    with torch.no_grad():
        model.first.weight[[0, 1, 2, 5]] = 0
        model.grouped.weight[[3, 4]] = 0
    found = shrink(model, torch.zeros(2, 1, 8, 8))
    assert found.removed == {"first": 2, "grouped": 2}
    assert "grouped convolution" in found.kept["first"]
    small = found.model
    assert isinstance(small, Grouped)
    assert (small.grouped.in_channels, small.grouped.out_channels, small.grouped.groups) == (6, 6, 2)
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_masks_drop_equally_many_channels_of_each_group_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = Grouped()
    with torch.no_grad():
        # By their norms alone the whole first group would go.
        model.first.weight[:4] *= 0.01
        model.grouped.weight[:4] *= 0.01
    channel_masks(model, Masks(), 0.5, torch.zeros(2, 1, 8, 8)).apply_(model)
    for layer in (model.first, model.grouped):
        dead = layer.weight.flatten(1).abs().amax(1) == 0
        assert dead.view(2, 4).sum(1).tolist() == [2, 2]
    found = shrink(model, torch.zeros(2, 1, 8, 8))
    assert (found.removed, found.kept) == ({"first": 4, "grouped": 4}, {})
    small = found.model
    assert isinstance(small, Grouped)
    assert (small.grouped.in_channels, small.grouped.out_channels, small.grouped.groups) == (4, 4, 2)
    assert torch.allclose(small(torch.ones(1, 1, 8, 8)), model(torch.ones(1, 1, 8, 8)), atol=1e-6)


class NotZero(nn.Module):
    """An activation that makes one of zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


def test_the_step_fails_where_zero_channels_mean_something() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), NotZero(), nn.Flatten(), nn.Linear(4 * 36, 10))
    masked(model, (1, 8, 8))
    with pytest.raises(ModelError, match="a layer makes something of channels that are zero"):
        Shrink().finish(model, context((1, 8, 8)))


class Fixed(nn.Module):
    """A forward that has its width written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.last = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.conv(x).view(-1, 144))
        return y


def test_a_forward_with_its_widths_written_down_is_told_apart() -> None:
    model = Fixed()
    masked(model, (1, 8, 8))
    with pytest.raises(ModelError, match="shrink: the model cannot be narrowed"):
        Shrink().finish(model, context((1, 8, 8)))


def test_a_batch_norm_without_weights_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )
    masked = channel_masks(model, Masks(), 0.5, torch.zeros(2, 1, 8, 8))
    masked.apply_(model)
    small = shrink(model, torch.zeros(2, 1, 8, 8))
    assert not small.removed
    assert list(small.kept.values()) == ["4 of 8 dead channels of 0 stay: 1 cannot be narrowed"]


def test_nothing_dead_is_said() -> None:
    model, shape = made("small_cnn")
    notes: list[str] = []
    small = Shrink().finish(model, context(shape, notes))
    assert notes == ["shrink: no channel is zero in every coupled layer, so nothing was removed"]
    assert torch.equal(small(torch.ones(1, *shape)), model(torch.ones(1, *shape)))


def test_a_shrunk_model_can_be_pruned_and_shrunk_again(tmp_path: Path) -> None:
    model, shape = made("resnet18")
    masked(model, shape)
    small = shrink(model, torch.zeros(2, *shape)).model
    use = Use(name="resnet18", parameters={"width": 8}, label="m")
    save_model(small, tmp_path / "a.safetensors", use, shape=shape, classes=CLASSES)
    child = load_model(tmp_path / "a.safetensors")
    masked(child, shape)
    smaller = shrink(child, torch.zeros(2, *shape)).model
    assert {group.width for group in channel_groups(smaller, torch.zeros(2, *shape))} == {2, 4, 8, 16}
    save_model(smaller, tmp_path / "b.safetensors", use, shape=shape, classes=CLASSES)
    x = torch.rand(2, *shape)
    assert torch.equal(load_model(tmp_path / "b.safetensors")(x), smaller.eval()(x))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"inner.groups.0.conv1": {"inputs": 1, "outputs": 10**9}}, "more than the architecture's 1 -> 8"),
        ({"inner.groups.0.conv1": {"inputs": 1, "outputs": 0}}, "greater than or equal to 1"),
        ({"inner.groups.0.conv1": {"inputs": 1, "outputs": -4}}, "greater than or equal to 1"),
        ({"inner.groups.0.conv1": {"inputs": 1, "outputs": 4, "groups": 2}}, "has 2 groups, the architecture has 1"),
        ({"inner.groups.0.norm1": {"inputs": 4, "outputs": 8}}, "takes as many as it gives"),
        ({"inner.groups.0.act1": {"inputs": 4, "outputs": 4}}, "no convolution, linear layer or batch norm"),
        ({"nowhere": {"inputs": 4, "outputs": 4}}, "nowhere is no convolution"),
        ({"inner.groups.0.conv1": {"inputs": 1, "outputs": 4}}, "has shape"),
    ],
)
def test_hostile_widths_are_refused(widths: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, shape = made("small_cnn")
    path = tmp_path / "m.safetensors"
    use = Use(name="small_cnn", parameters={"widths": [8, 16]}, label="m")
    save_model(model, path, use, shape=shape, classes=CLASSES)
    with safe_open(str(path), framework="pt") as file:
        described = json.loads(file.metadata()["robustkit"])
    described["widths"] = widths
    save_file(load_file(path), path, metadata={"robustkit": json.dumps(described)})
    with pytest.raises(ModelError, match=message):
        load_model(path)


RECIPE = """\
name: slim
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [8, 16]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 1, batch_size: 64}
variants:
  baseline:
  slim: {from: baseline, compress: [shrink, channel_l2: {sparsity: 50%}], train: {epochs: 1}}
  masked: {from: baseline, compress: [channel_l2: {sparsity: 50%}]}
  masked-slim: {from: masked, compress: [shrink]}
  slim-again: {from: slim, defenses: [n_fgsm], train: {epochs: 1}}
evaluate: {examples: 40, attacks: [fgsm], latency: false}
"""


def test_shrink_from_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "slim.yaml").write_text(RECIPE)
    assert cli(["run", str(tmp_path / "slim.yaml"), "--runs", str(tmp_path), "--quiet"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "slim/results.json").read_text())["variants"]}
    assert rows["masked-slim"]["clean"]["value"] == rows["masked"]["clean"]["value"]
    for name in ("slim", "masked-slim", "slim-again"):
        assert rows[name]["parameters"] < 0.4 * rows["baseline"]["parameters"]
        assert rows[name]["sparsity"] < 0.01
    assert rows["masked"]["parameters"] == rows["baseline"]["parameters"]
    assert any("shrink: 24 channels removed" in note for note in rows["slim"]["notes"])
