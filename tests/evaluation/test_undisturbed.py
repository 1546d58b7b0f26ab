"""An evaluation in the middle of something else: a backward to come, hooks that set weights, modes that matter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm

import robustkit
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import clean_outcome
from robustkit.evaluation.curve import security_curve

CPU = torch.device("cpu")
THREAT = Threat("linf", 0.1)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(12, 1, 8, 8), torch.arange(12) % 3


@pytest.mark.parametrize("training", [False, True])
def test_a_backward_that_is_still_to_come_works(training: bool, images: tuple[Tensor, Tensor]) -> None:
    model = small().train(training)
    x, y = images
    expected = copy.deepcopy(model)
    nn.functional.cross_entropy(expected(x), y).backward()
    loss = nn.functional.cross_entropy(model(x), y)
    robustkit.evaluate(model, x, y, threat=THREAT, attacks=["pgd"])
    loss.backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def pruned() -> nn.Sequential:
    model = small()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def normed() -> nn.Sequential:
    model = small()
    spectral_norm(model[4])
    return model


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(("make", "place"), [(pruned, 0), (normed, 4)])
def test_weights_that_a_hook_sets_stay_what_they_were(make: object, place: int, images: tuple[Tensor, Tensor]) -> None:
    assert callable(make)
    model = make()
    x, y = images
    model(x)
    weight = model[place].weight
    values = weight.detach().clone()
    assert weight.requires_grad

    def tramples(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            weight.mul_(2)
        return x

    robustkit.evaluate(model, x, y, threat=THREAT, attacks={"pgd": {}, "tramples": tramples})
    assert model[place].weight is weight
    assert weight.requires_grad
    assert torch.equal(weight, values)


def test_a_buffer_that_cannot_be_compared_is_no_obstacle(images: tuple[Tensor, Tensor]) -> None:
    model = small()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    robustkit.evaluate(model, *images, threat=THREAT, attacks=["fgsm"])
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


class RightInEvalMode(nn.Module):
    """Class 0 in eval mode, class 1 in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, :1] * 0
        return torch.cat([first, first + (1 if self.training else -1)], 1)


def test_clean_accuracy_is_that_of_eval_mode() -> None:
    x, y = torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    model = RightInEvalMode().train()
    assert clean_outcome(model, x, y, batch_size=4, device=CPU).correct.all()
    assert model.training


def test_the_verdict_on_an_attack_is_that_of_eval_mode() -> None:
    """Also when the attack leaves the model in training mode."""

    def trains(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        assert not model.training
        model.train()
        return x

    x, y = torch.rand(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    found = robustkit.evaluate(RightInEvalMode(), x, y, threat=THREAT, attacks={"trains": trains}, batch_size=4)
    assert found.worst.value == 1.0


class Weighing(Pgd):
    """PGD that notes how many examples it is given at each eps."""

    given: dict[float, int] = {}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        eps = float(threat.eps)
        self.given[eps] = self.given.get(eps, 0) + len(x)
        return super().__call__(model, x, y, threat, generator=generator)


def test_a_security_curve_leaves_fooled_examples_alone() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    means = 0.5 + torch.arange(-4, 16) / 100
    x, y = means[:, None, None, None].expand(20, 1, 4, 4).clone(), torch.ones(20, dtype=torch.int64)
    model, attack = Mean(), Weighing(steps=10)
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    right = int(clean.correct.sum())
    eps = [0.055, 0.105, 0.2]
    curve = security_curve(model, x, y, attack, "linf", eps, clean=clean, seed=0, batch_size=8, device=CPU)
    assert curve == [10, 5, 0]
    assert attack.given == {0.055: right, 0.105: 10, 0.2: 5}
