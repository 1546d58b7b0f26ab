"""Regularization against formulas by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustkit.attacks.threat import Threat
from robustkit.defenses.regularization import L1, LabelSmoothing, WeightDecay, l1_penalty, smooth_labels, weights_of
from robustkit.train.hooks import Batch, Forward, Step


class Model(nn.Module):
    """Convolution, batch norm, linear layer, a scale of its own, and a layer norm with a matrix of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.norm = nn.LayerNorm((2, 2))
        self.fc = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.norm(self.bn(self.conv(x))).flatten(1)) * self.scale
        return result


def make_step(model: nn.Module) -> Step:
    return Step(model, 0, 1, 0.0, Threat("linf", 0.1), torch.Generator())


def make_batch() -> Batch:
    return Batch(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), torch.arange(4), 3)


def names_of(model: nn.Module, group: list[nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is member for member in group)}


@pytest.mark.parametrize(
    ("norms", "biases", "decayed"),
    [
        (False, False, {"conv.weight", "fc.weight"}),
        (True, False, {"conv.weight", "fc.weight", "bn.weight", "bn.bias", "norm.weight", "norm.bias"}),
        (False, True, {"conv.weight", "fc.weight", "conv.bias", "fc.bias", "scale"}),
    ],
)
def test_weight_decay_groups(norms: bool, biases: bool, decayed: set[str]) -> None:
    model = Model()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.5, "lr": 0.3}]
    split = WeightDecay(amount=0.01, norms=norms, biases=biases).parameter_groups(groups, model)
    assert [(group["weight_decay"], group["lr"]) for group in split] == [(0.01, 0.3), (0.0, 0.3)]
    assert names_of(model, split[0]["params"]) == decayed
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(model, split[1]["params"]) == everything - decayed
    assert sum(len(group["params"]) for group in split) == len(everything)


def test_weight_decay_shrinks_weights_and_nothing_else() -> None:
    model = Model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    groups = WeightDecay(amount=0.1).parameter_groups([{"params": list(model.parameters())}], model)
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.95 if name in ("conv.weight", "fc.weight") else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


def test_a_shared_weight_is_decayed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert len(weights_of(model)) == 1


def test_l1_is_the_sum_of_absolute_weights_and_its_gradient_the_sign() -> None:
    model = Model()
    batch = make_batch()
    penalty = L1(amount=0.25).penalty(batch, Forward(model, batch), make_step(model))
    assert penalty is not None
    by_hand = 0.25 * (model.conv.weight.abs().sum() + model.fc.weight.abs().sum())
    torch.testing.assert_close(penalty, by_hand)
    penalty.backward()
    torch.testing.assert_close(model.fc.weight.grad, 0.25 * model.fc.weight.detach().sign())
    assert model.fc.bias.grad is None
    torch.testing.assert_close(l1_penalty([torch.tensor([[-1.0, 2.0]]), torch.tensor([3.0])]), torch.tensor(6.0))


def test_l1_of_a_model_without_weights_is_nothing() -> None:
    model, batch = nn.Flatten(), make_batch()
    assert L1().penalty(batch, Forward(model, batch), make_step(model)) is None


def test_label_smoothing_is_the_formula() -> None:
    batch = make_batch()
    smoothed = LabelSmoothing(amount=0.3).transform_batch(batch, make_step(Model()))
    assert smoothed.target is not None
    torch.testing.assert_close(smoothed.target[0], torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(smoothed.target.sum(1), torch.ones(4))
    logits = torch.randn(4, 3)
    torch.testing.assert_close(
        nn.functional.cross_entropy(logits, smoothed.target),
        nn.functional.cross_entropy(logits, batch.y, label_smoothing=0.3),
    )
    assert batch.target is None, "the caller's batch was changed"


def test_label_smoothing_keeps_targets_that_are_soft_already() -> None:
    mixed = torch.tensor([[0.6, 0.4, 0.0]])
    torch.testing.assert_close(smooth_labels(mixed, 0.1), mixed * 0.9 + 0.1 / 3)
