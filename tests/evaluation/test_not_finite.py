"""Logits that are not finite: wrong without an attack, no success under one, and never without a flag."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome

CPU = torch.device("cpu")
BAD = [torch.nan, torch.inf, -torch.inf]


class Overflows(nn.Module):
    """Reads the class from the first three pixels; one logit is `value` where the last pixel is above a half."""

    def __init__(self, value: float = torch.nan) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        logits = 5 * x.flatten(1)[:, :3]
        bad = x.flatten(1)[:, -1:] > 0.5
        return torch.where(bad & (torch.arange(3) == 0), self.value, logits)


def images(last: float, count: int = 20) -> tuple[Tensor, Tensor]:
    """Images that all show class 0, with `last` as their last pixel."""
    x = torch.zeros(count, 1, 3, 3)
    x[:, 0, 0, 0] = 1
    x[:, 0, 2, 2] = last
    return x, torch.zeros(count, dtype=torch.int64)


def bright(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
    """Make the last pixel brighter by eps."""
    found = x.clone()
    found[:, 0, 2, 2] += threat.eps
    return found


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("attacks", [[], ["fgsm"]])
def test_an_image_without_finite_logits_is_wrong_and_flagged_wherever_it_is(value: float, attacks: list[str]) -> None:
    fine, bad = images(0.0, 100), images(1.0, 50)
    x, y = (torch.cat(pair) for pair in zip(fine, bad, strict=True))
    found = robustkit.evaluate(Overflows(value), x, y, threat=Threat("linf", 0.01), attacks=attacks)
    assert found.clean.value == pytest.approx(100 / 150)
    assert found.correct.tolist() == [True] * 100 + [False] * 50
    assert found.outcomes["clean"].not_finite == 50
    assert found.outcomes["clean"].prediction.tolist() == [0] * 100 + [-1] * 50
    (flag,) = [flag for flag in found.flags if flag.id == "P8"]
    assert flag.severity == "wrong"
    assert "50 test images" in flag.message


@pytest.mark.parametrize("value", BAD)
def test_an_attack_does_not_succeed_by_logits_that_are_not_finite(value: float) -> None:
    x, y = images(0.45)
    found = robustkit.evaluate(Overflows(value), x, y, threat=Threat("linf", 0.1), attacks={"bright": bright})
    assert found.worst.value == 1.0
    outcome = found.outcomes["bright"]
    assert (outcome.not_finite, outcome.prediction.tolist()) == (20, [0] * 20)
    (flag,) = [flag for flag in found.flags if flag.id == "P8"]
    assert flag.severity == "doubt"
    assert "bright: logits of 20 attacked images" in flag.message


def test_the_image_kept_of_such_an_example_is_the_clean_one() -> None:
    x, y = images(0.45)
    model = Overflows()
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    outcome = attack_outcome(
        model, x, y, bright, Threat("linf", 0.1), clean=clean, seed=0, label="b", batch_size=8, device=CPU, keep=3
    )
    assert outcome.adversarial is not None
    assert torch.equal(outcome.adversarial, x[:3])
    assert np.allclose(outcome.distance, 0.1)


MODEL = """\
import torch
from torch import nn


class Overflows(nn.Module):
    "Gives no finite logits for the brighter images, in eval mode only."

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(64 * in_channels, num_classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        bad = x.flatten(1).mean(1, keepdim=True) > 0
        return logits if self.training else torch.where(bad, torch.nan, logits)
"""
RECIPE = """\
name: overflow
data: {digits: {limit: 400}}
model: 'overflows.py:Overflows'
threat: {norm: linf, eps: 0.05}
train: {epochs: 1, batch_size: 64, guards: false}
variants: {baseline: }
evaluate: {examples: 80, attacks: [fgsm], eps_curve: [], latency: false}
"""


def test_a_run_flags_them_too(tmp_path: Path) -> None:
    (tmp_path / "overflows.py").write_text(MODEL)
    (tmp_path / "overflow.yaml").write_text(RECIPE)
    found = robustkit.run(tmp_path / "overflow.yaml", runs=tmp_path)
    messages = [flag.message for flag in found.variants[0].flags if flag.id == "P8" and flag.severity == "wrong"]
    assert any("test images are not finite" in message for message in messages)
    assert found.variants[0].clean.value < 0.9
