"""Flags from comparing attacks: which attack must find what another one finds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.attacks.torchattacks import TorchAttack
from robustkit.evaluation.api import make_attacks
from robustkit.evaluation.compare import compare_flags, subset_flags
from robustkit.results import GateResult

TOTAL = 1000
Found = list[tuple[str, str]]


def flags(attacks: dict[str, range | int]) -> Found:
    """The flags where each attack, by its plugin's name, fools these of 1000 examples, or the first so many."""
    correct = {"clean": np.ones(TOTAL, dtype=np.bool_)}
    for name, fooled in attacks.items():
        correct[name] = np.ones(TOTAL, dtype=np.bool_)
        correct[name][list(range(fooled) if isinstance(fooled, int) else fooled)] = False
    return [(flag.id, flag.severity) for flag in compare_flags(correct, {name: name for name in attacks})]


MANY = ["pgd", "cascade", "autoattack", "apgd", "torchattacks.BIM", "torchattacks.CW", "mine"]


@pytest.mark.parametrize("many", MANY)
def test_every_attack_of_many_steps_is_held_to_what_weaker_ones_find(many: str) -> None:
    assert flags({"noise": 100, many: 0}) == [("E4", "doubt")]
    assert flags({"fgsm": 100, many: 0}) == [("E2", "wrong")]
    assert flags({"fgsm": range(50), many: range(50, 200)}) == [("E2", "doubt")]
    assert flags({"square": 100, many: 0}) == [("E3", "doubt")]
    assert flags({"torchattacks.Square": 100, many: 0}) == [("E3", "doubt")]
    assert flags({"noise": 100, "fgsm": 150, "square": 180, many: 200}) == []


def test_noise_is_held_against_the_strongest_kind_of_attack_that_was_run() -> None:
    assert flags({"noise": 100, "fgsm": 50}) == [("E4", "doubt")]
    assert flags({"noise": 100, "square": 50}) == [("E4", "doubt")]
    assert flags({"noise": 100, "fgsm": 100, "pgd": 97}) == [("E4", "doubt")]
    assert flags({"noise": 100, "fgsm": 100, "square": 0}) == []


def test_few_examples_are_chance() -> None:
    assert flags({"noise": 2, "pgd": 0}) == []
    assert flags({"noise": 3, "pgd": 0}) == [("E4", "doubt")]
    assert flags({"fgsm": 5, "pgd": 0}) == []
    assert flags({"square": 2, "pgd": 0}) == []


def test_noise_alone_is_no_attack() -> None:
    assert flags({"noise": 100}) == [("E4", "note")]
    assert flags({"noise": 0, "torchattacks.VANILA": 0}) == [("E4", "note")]
    assert flags({"square": 100}) == flags({"fgsm": 100}) == flags({}) == []


def test_a_control_and_attacks_on_few_pixels_need_not_find_anything() -> None:
    for name in ("torchattacks.VANILA", "torchattacks.JSMA", "torchattacks.SparseFool", "torchattacks.OnePixel"):
        assert flags({"fgsm": 500, name: 0}) == []


class Outward(nn.Module):
    """Right at a half, wrong far from it on either side; no gradient leads there."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, :1]
        far = ((pixel - 0.5).abs() > 0.05).float()
        return torch.cat([1 - 2 * far + 0 * pixel, 0 * far], 1)


@pytest.mark.parametrize("attacks", [["noise", "fgsm"], ["fgsm", "noise", {"torchattacks.BIM": {"steps": 2}}]])
def test_noise_that_finds_what_gradients_miss_is_flagged(attacks: list[str]) -> None:
    x, y = torch.full((40, 1, 2, 2), 0.5), torch.zeros(40, dtype=torch.int64)
    found = robustkit.evaluate(Outward(), x, y, threat=Threat("linf", 0.1), attacks=attacks)
    assert found.attacks["noise"].value < 0.1
    assert ("E4", "doubt") in [(flag.id, flag.severity) for flag in found.flags]


def test_an_attack_of_ones_own_that_does_nothing_is_flagged() -> None:
    class Nothing:
        def __call__(
            self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
        ) -> Tensor:
            return x

    def bright(x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)

    x, y = torch.full((40, 1, 2, 2), 0.45), torch.zeros(40, dtype=torch.int64)
    for attacks, expected in ((["fgsm", Nothing()], "E2"), (["noise", {"pgd": Nothing()}], "E4")):
        found = robustkit.evaluate(bright, x, y, threat=Threat("linf", 0.3), attacks=attacks)
        assert expected in [flag.id for flag in found.flags if flag.severity != "note"]


def test_an_object_of_torchattacks_is_the_attack_that_it_is() -> None:
    made = make_attacks([TorchAttack("Square", {}), {"mine": TorchAttack("FGSM", {})}])
    assert {label: kind for label, (kind, _) in made.items()} == {
        "torchattack": "torchattacks.Square",
        "mine": "torchattacks.FGSM",
    }


def test_comparing_imports_no_torch() -> None:
    code = "import sys, robustkit.evaluation.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("right", "n", "says"),
    [(0.49, 500, "(at least 1,917 would)"), (0.49, 5000, "(many more would)"), (0.5, 500, "(no number would)")],
)
def test_a_gate_within_noise_says_how_many_examples_would_decide_it(right: float, n: int, says: str) -> None:
    within = GateResult(text="worst(a) >= worst(b)", left=0.5, right=right, verdict="holds (within noise)")
    (flag,) = subset_flags([within], n)
    assert says in flag.message
    assert subset_flags([within.model_copy(update={"verdict": "holds"})], n) == []
