"""Models of other floating types, and calls under `torch.inference_mode()`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.errors import ModelError
from robustkit.evaluation.api import Evaluation

ATTACKS = ["noise", "fgsm", {"pgd": {"steps": 5}}, {"torchattacks.PGD": {"steps": 5}}]


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.rand(40, 1, 8, 8)
    return x, small()(x).argmax(1)


def evaluated(model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor = 0.02) -> Evaluation:
    return robustkit.evaluate(model, x, y, threat=Threat("linf", eps), attacks=ATTACKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_is_attacked_in_it(dtype: torch.dtype, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model = small().to(dtype).train()
    expected = evaluated(small(), x, y)
    assert 0 < expected.worst.value < 1
    found = evaluated(model, x, y)
    assert found.clean.value >= 0.9
    for label, rate in expected.attacks.items():
        assert found.attacks[label].value == pytest.approx(rate.value, abs=0.1)
    assert found.outcomes["pgd"].backwards > 0
    assert {one.dtype for one in model.parameters()} == {dtype}
    assert all(module.training for module in model.modules())
    assert [flag.id for flag in found.flags if flag.severity == "wrong"] == []
    assert [flag.id for flag in found.flags if flag.id == "P5"] == ["P5"]


def test_inference_mode_changes_nothing(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model, eps = small(), torch.full((40,), 0.02)
    expected = evaluated(model, x, y, eps)
    with torch.inference_mode():
        found = evaluated(model, x.clone(), y.clone(), eps.clone())
        assert torch.is_inference_mode_enabled()
    assert found.attacks == expected.attacks
    assert (found.worst, found.flags) == (expected.worst, expected.flags)


def test_a_model_made_in_inference_mode_says_so(images: tuple[Tensor, Tensor]) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(small())
        with pytest.raises(ModelError, match="inference_mode"):
            evaluated(model, *images)
    with pytest.raises(ModelError, match="inference_mode"):
        evaluated(model, *images)


def test_something_else_than_logits_is_still_an_error(images: tuple[Tensor, Tensor]) -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (x, x)  # type: ignore[return-value]

    with pytest.raises(ModelError, match="tuple"):
        evaluated(Pair(64, 3).double(), *images)
