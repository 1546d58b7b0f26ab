"""Lottery tickets and batch norm's statistics: early weights under late masks; averages over all batches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustkit.api import run
from robustkit.attacks.threat import Threat
from robustkit.compress.base import CompressContext
from robustkit.compress.channels import ChannelL2, dead_channels
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import prunable, sparsity_of
from robustkit.compress.prune import GlobalL1
from robustkit.compress.recalibrate import Recalibrate, recalibrate
from robustkit.compress.rewind import EpochKeeper, Rewind, rewind
from robustkit.data.split import split_of
from robustkit.defenses.averaging import Ema
from robustkit.defenses.constraints import SpectralNorm
from robustkit.errors import ModelError, RecipeError, TrainingError
from robustkit.models.artefact import load_model
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.schema import parse_recipe
from robustkit.train.hooks import Defense, Step, evaluated_model

THREAT = Threat("linf", 0.1)
EXAMPLE = torch.zeros(2, 1, 8, 8)


def network(seed: int) -> SmallCnn:
    torch.manual_seed(seed)
    return SmallCnn((1, 8, 8), 10, [8, 16])


def test_late_masks_on_early_weights() -> None:
    early, late = network(0), network(1)
    largest = {name: weight.detach().clone() for name, weight in prunable(late)}
    held = MaskKeeper(
        [Rewind(), GlobalL1(0.8)],
        inherit=False,
        context_seed=0,
        example=EXAMPLE,
        threat=THREAT,
        early=lambda epoch: {0: early.state_dict()}[epoch],
    )
    held.prepare_model(late)
    assert sparsity_of(late) == pytest.approx(0.8, abs=1e-3)
    alone = MaskKeeper([GlobalL1(0.8)], inherit=False, context_seed=0, example=EXAMPLE, threat=THREAT)
    other = network(1)
    alone.prepare_model(other)
    for (name, weight), (_, masked), (_, first) in zip(prunable(late), prunable(other), prunable(early), strict=True):
        assert torch.equal(weight != 0, masked != 0), "the masks are the late model's"
        assert torch.equal(weight, first * (masked != 0)), "the weights are the early model's"
        assert not torch.equal(largest[name], first)


def test_early_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(ModelError, match=r"do not fit the model, e\.g\. groups\.0\.conv1\.weight"):
        rewind(network(0), SmallCnn((1, 8, 8), 10, [4, 16]).state_dict())
    with pytest.raises(ModelError, match="do not fit"):
        rewind(network(0), {})
    with pytest.raises(ModelError, match="needs the early weights"):
        Rewind().start(network(0), CompressContext(EXAMPLE, torch.Generator(), THREAT))


def test_the_weights_after_an_epoch_are_those_after_its_last_step() -> None:
    model, held = network(0), EpochKeeper([2])
    seen: list[Tensor] = []
    for epoch in range(3):
        for number in range(7):
            with torch.no_grad():
                model.head.weight.add_(1.0)
            held.after_step(Step(model, epoch, 3, (epoch + number / 7) / 3, THREAT, torch.Generator(), 1 / 21))
        seen.append(model.head.weight.detach().clone())
    assert torch.equal(held.weights(2)["head.weight"], seen[1])
    with pytest.raises(TrainingError, match="ended before epoch 1"):
        held.weights(1)
    resumed = EpochKeeper([2])
    resumed.load_state_dict(copy.deepcopy(held.state_dict()))
    assert torch.equal(resumed.weights(2)["head.weight"], seen[1])


def test_early_weights_are_those_of_the_plain_model() -> None:
    """Whatever the root was trained with: a child that is rewound may be trained without it."""
    spectral = SpectralNorm()
    model = spectral.prepare_model(network(0)).eval()
    held = EpochKeeper([1], [spectral])
    held.after_step(Step(model, 0, 1, 0.0, THREAT, torch.Generator(), 1.0))
    computed = {name: weight.detach().clone() for name, weight in prunable(model)}
    ticket = network(1).eval()
    rewind(ticket, held.weights(1))
    assert all(torch.equal(computed[name], weight) for name, weight in prunable(ticket))
    assert len(list(model.named_parameters())) == len(list(ticket.named_parameters()))
    assert "parametrizations" in dict(model.head.named_children()), "the model in training is left alone"


RECIPE = """\
name: tickets
data: {digits: {limit: 200}}
model: {small_cnn: {widths: [4, 8]}}
train: {epochs: 2, batch_size: 64, select: last}
variants:
  baseline:
  half: {from: baseline, compress: [global_l1: {sparsity: 50%}, rewind], train: {optimizer: {sgd: {lr: 1e-9}}}}
  ticket:
    from: half
    compress: [global_l1: {sparsity: 80%}, rewind: {epoch: 1}]
    train: {optimizer: {sgd: {lr: 1e-9}}}
evaluate: {examples: 20, attacks: [noise], latency: false}
"""


@pytest.mark.slow
def test_tickets_from_a_recipe(tmp_path: Path) -> None:
    """With a learning rate of nothing the weights that are left are those that they were rewound to."""
    run(RECIPE, runs=tmp_path)
    kept = list(tmp_path.glob("tickets/steps/*/epoch-1.safetensors"))
    assert len(kept) == 1
    from safetensors.torch import load_file

    early = load_file(kept[0])
    for path in tmp_path.glob("tickets/steps/*/model.safetensors"):
        model = load_model(path)
        if sparsity_of(model) > 0.75:
            for name, weight in prunable(model):
                assert torch.allclose(weight, early[name] * (weight != 0), atol=1e-6)
            return
    raise AssertionError("no ticket was found")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("{compress: [rewind]}", "the variant has none"),
        ("{from: baseline, compress: [rewind]}", "not trained again"),
        (
            "{from: baseline, compress: [rewind: {epoch: 3}], train: {}}",
            "rewind to epoch 3, but 'baseline' is trained for 2",
        ),
        ("{from: slim, compress: [rewind], train: {}}", "channels that 'slim' removed"),
        (
            "{from: baseline, model: {small_cnn: {widths: [8, 8]}}, compress: [rewind], train: {}}",
            "the early weights are those of 'baseline', another model",
        ),
        ("{from: baseline, compress: [rewind: {epoch: -1}], train: {}}", "greater than or equal to 0"),
    ],
)
def test_a_rewind_that_cannot_be_is_a_mistake_in_the_recipe(variant: str, message: str) -> None:
    slim = "  slim: {from: baseline, compress: [channel_l2: {sparsity: 50%}, shrink]}\n"
    text = RECIPE.replace("evaluate:", f"{slim}  wrong: {variant}\nevaluate:")
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_recalibrated_statistics_are_averages_over_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))
    model[1].running_mean.fill_(9.0)  # type: ignore[operator,union-attr]
    batches = [torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8)]
    before = copy.deepcopy(dict(model.named_parameters()))
    assert recalibrate(model, batches) == 1
    maps = [model[0](x).detach() for x in batches]
    mean = sum(one.mean((0, 2, 3)) for one in maps) / 2
    variance = sum(one.transpose(0, 1).flatten(1).var(1) for one in maps) / 2
    assert torch.allclose(model[1].running_mean, mean, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(model[1].running_var, variance, atol=1e-6)  # type: ignore[arg-type]
    assert model[1].momentum == 0.1
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    notes: list[str] = []
    train = split_of(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
    Recalibrate(batch_size=4).finish(model, CompressContext(EXAMPLE, torch.Generator(), THREAT, train, notes.append))
    assert notes == ["recalibrate: 1 batch norms measured on 5 training images"]


class Averaged(Defense):
    """An average of the weights, taken before the masks are applied."""

    def __init__(self, model: nn.Module) -> None:
        self.mean = copy.deepcopy(model)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for mean, value in zip(self.mean.parameters(), step.model.parameters(), strict=True):
            mean.lerp_(value, 0.5)

    def evaluated_model(self, model: nn.Module) -> nn.Module:
        return self.mean


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_neither_moments_nor_averages_bring_a_zero_back(kind: str) -> None:
    model = network(0)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.01)
        if kind == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    )
    averaged = Averaged(model)
    held = MaskKeeper(
        [GlobalL1(0.8, "cubic", end=0.5, updates=2)], inherit=False, context_seed=0, example=EXAMPLE, threat=THREAT
    )
    held.prepare_model(model)
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    for number in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for defense in (averaged, held):
            defense.after_step(Step(model, 0, 1, number / 6, THREAT, torch.Generator(), 1 / 6))
        shown = held.evaluated_model(averaged.evaluated_model(model))
        for (name, weight), (_, mean) in zip(prunable(model), prunable(shown), strict=True):
            mask = held.masks.of(name, weight) == 0
            assert not bool(weight[mask].any())
            assert not bool(mean[mask].any())
    assert sparsity_of(shown) == pytest.approx(0.8, abs=1e-3)


def test_channels_that_were_dropped_do_not_live_on_in_averages_that_are_evaluated() -> None:
    model = network(0)
    held = MaskKeeper(
        [ChannelL2(0.5, "cubic", end=1.0, updates=2)], inherit=False, context_seed=0, example=EXAMPLE, threat=THREAT
    )
    hooks = [held, Ema()]
    held.prepare_model(model)
    for number in range(4):
        for hook in hooks:
            hook.after_step(Step(model, 0, 1, number / 3, THREAT, torch.Generator(), 1 / 3))
    shown = evaluated_model(model, hooks)
    assert shown is not model
    assert all(2 * dead == width for _, dead, width in dead_channels(shown, EXAMPLE))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lone_images_are_measured_where_they_can_be(batch_size: int) -> None:
    """Of one image a map has a variance; a batch norm of vectors needs two."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4))
    train = split_of(torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8), torch.arange(5))
    context = CompressContext(EXAMPLE, torch.Generator(), THREAT, train)
    if batch_size == 1:
        with pytest.raises(ModelError, match="two images or more"):
            Recalibrate(batch_size=1).finish(model, context)
        model[4] = nn.Identity()
    Recalibrate(batch_size=batch_size).finish(model, context)
    means = model[0](train.floats(0, 5)).mean((0, 2, 3)) if batch_size == 1 else None
    assert bool((model[1].running_mean != 0).all())  # type: ignore[operator,union-attr]
    if means is not None:
        assert torch.allclose(model[1].running_mean, means, atol=1e-6)  # type: ignore[arg-type]
