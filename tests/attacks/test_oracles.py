"""Attacks against models whose robustness is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import Linear, digits, half_space, slack, softmax_regression
from torch import Tensor, nn

from robustkit.attacks.gradient import Fgsm, Pgd, fgsm
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.outcome import Outcome

CPU = torch.device("cpu")


def attacked(model: nn.Module, x: Tensor, y: Tensor, attack: object, threat: Threat) -> tuple[Outcome, Outcome]:
    clean = clean_outcome(model, x, y, batch_size=512, device=CPU)
    found = attack_outcome(
        model,
        x,
        y,
        attack,
        threat,
        clean=clean,
        seed=0,
        label="a",
        batch_size=512,
        device=CPU,  # type: ignore[arg-type]
    )
    return clean, found


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1, 0.2])
def test_linf_is_exact_on_real_digits(eps: float) -> None:
    x, y = digits()
    model = softmax_regression()
    left = slack(model, x, y, "linf", eps)
    clean, found = attacked(model, x, y, Pgd(steps=10, restarts=10), Threat("linf", eps))
    clear = np.abs(left) > 1e-5
    assert clear.sum() > 1780
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert found.projected == 0


@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_l2_is_exact_on_real_digits(eps: float) -> None:
    x, y = (part[:600] for part in digits())
    model = softmax_regression()
    left = slack(model, x, y, "l2", eps)
    clean, found = attacked(model, x, y, Pgd(steps=60, restarts=10, relative_step=0.2), Threat("l2", eps))
    clear = np.abs(left) > 1e-3
    assert clear.sum() > 590
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert found.projected == 0


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_l1_is_exact_on_real_digits(eps: float) -> None:
    x, y = digits()
    model = softmax_regression()
    left = slack(model, x, y, "l1", eps)
    clean, found = attacked(model, x, y, Pgd(steps=20, restarts=10), Threat("l1", eps))
    clear = np.abs(left) > 1e-3
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert found.projected == 0


@pytest.mark.parametrize("eps", [1, 2, 3])
def test_l0_is_exact_on_real_digits(eps: int) -> None:
    x, y = digits()
    model = softmax_regression()
    left = slack(model, x, y, "l0", eps)
    clean, found = attacked(model, x, y, Pgd(steps=10, restarts=10), Threat("l0", eps))
    clear = np.abs(left) > 1e-5
    assert clear.sum() > 1790
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert found.projected == 0
    _, single = attacked(model, x, y, Fgsm(loss="margin"), Threat("l0", eps))
    assert not (~single.correct & clean.correct & (left > 0))[clear].any(), "stronger than is possible"
    assert single.rate.value < found.rate.value + 0.05


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_margin_restart_is_nearly_exact_and_never_too_strong(norm: str) -> None:
    x, y = digits()
    model = softmax_regression()
    eps = {"linf": 0.05, "l2": 0.3, "l1": 0.5}[norm]
    left = slack(model, x, y, norm, eps)
    _, found = attacked(model, x, y, Pgd(steps=20), Threat(norm, eps))  # type: ignore[arg-type]
    assert not (~found.correct & (left > 1e-5)).any(), "an example was fooled that cannot be"
    assert abs(found.correct.mean() - (left > 0).mean()) < 0.01


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dimensions", [3, 64, 3072])
def test_the_boundary_of_a_half_space_is_found_to_four_digits(norm: str, dimensions: int) -> None:
    distance = {"linf": 0.25, "l2": 0.25 * math.sqrt(dimensions), "l1": 0.25 * dimensions}[norm]
    x, y = torch.full((2, dimensions), 0.75), torch.ones(2, dtype=torch.int64)
    model = half_space(dimensions).float()
    for attack in (Pgd(steps=40, relative_step=0.3), Fgsm()):
        for factor, robust in ((0.9996, True), (1.0004, False)):
            if norm == "l1" and distance * factor > 0.75 * dimensions:
                continue
            _, found = attacked(model, x, y, attack, Threat(norm, distance * factor))  # type: ignore[arg-type]
            assert bool(found.correct.all()) is robust
            assert bool(found.correct.any()) is robust
            assert found.projected == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_box_in_reach_the_dual_norm_decides(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 20, generator=generator)
    x = 0.5 + 0.02 * torch.randn(200, 20, generator=generator)
    model = Linear(weight, torch.zeros(3) - weight.sum(1) * 0.5)
    y = model(x).argmax(1)
    eps = 0.004 if norm == "linf" else 0.015
    v = (weight[None] - weight[y][:, None]).double()
    dual = v.abs().sum(2) if norm == "linf" else v.norm(dim=2)
    logits = model(x).double()
    margins = logits.gather(1, y[:, None]) - logits - eps * dual
    left = margins.scatter(1, y[:, None], torch.inf).amin(1).detach().numpy()
    _, found = attacked(model, x, y, Pgd(steps=40, restarts=3, relative_step=0.3), Threat(norm, eps))  # type: ignore[arg-type]
    clear = np.abs(left) > 1e-4
    assert 0.1 < (left > 0).mean() < 0.9
    assert (found.correct[clear] == (left > 0)[clear]).all()


class Union(nn.Module):
    """Class 0 against the largest of several affine functions: the wrong region is a union of half-spaces."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.pieces = Linear(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        largest = self.pieces(x).amax(1)
        return torch.stack([torch.zeros_like(largest), largest], 1)


def test_a_union_of_half_spaces_needs_restarts_and_is_solved_by_them() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.functional.normalize(torch.randn(4, 4, generator=generator), dim=1)
    x = 0.5 + 0.1 * (torch.rand(400, 4, generator=generator) - 0.5)
    model = Union(weight, -(weight.sum(1) * 0.5 + 0.12))
    eps = 0.06
    left = (-(x.double() @ weight.double().T + model.pieces.layer.bias.double()) - eps * weight.abs().sum(1)).amin(1)
    robust = (left > 0).numpy()
    y = torch.zeros(400, dtype=torch.int64)
    clean, one = attacked(model, x, y, Pgd(steps=20, random_start=False), Threat("linf", eps))
    _, many = attacked(model, x, y, Pgd(steps=20, restarts=60), Threat("linf", eps))
    clear = np.abs(left.detach().numpy()) > 1e-5
    assert clean.correct.all()
    assert (one.correct & ~robust & clear).sum() > 5, "this oracle is too easy: nothing is left for restarts"
    assert (many.correct[clear] == robust[clear]).all()


def test_saturated_cross_entropy_is_no_defense_against_the_margin_loss() -> None:
    x, y = (part[:500] for part in digits())
    plain = softmax_regression()
    loud = nn.Sequential(plain, Scale(1e4))
    threat = Threat("linf", 0.1)
    clean, true = attacked(plain, x, y, Pgd(restarts=2), threat)
    _, margin = attacked(loud, x, y, Pgd(restarts=2), threat)
    _, entropy = attacked(loud, x, y, Pgd(restarts=2, loss="ce"), threat)
    assert (margin.correct == true.correct).mean() > 0.995
    assert entropy.rate.value > true.rate.value + 0.1
    assert clean.rate.value > 0.9


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


def test_fgsm_is_one_step_of_eps_along_the_sign() -> None:
    x, y = (part[:50] for part in digits())
    model = softmax_regression()
    x = x.clamp(0.2, 0.8)
    start = x.clone().requires_grad_(True)
    nn.functional.cross_entropy(model(start), y, reduction="sum").backward()
    assert start.grad is not None
    expected = x + 0.1 * start.grad.sign()
    torch.testing.assert_close(fgsm(model, x, y, Threat("linf", 0.1)), expected)


def test_each_example_has_its_own_eps() -> None:
    x, y = digits()
    model = softmax_regression()
    small, large = slack(model, x, y, "linf", 0.02), slack(model, x, y, "linf", 0.1)
    eps = torch.where(torch.arange(len(y)) % 2 == 0, 0.02, 0.1)
    clean, found = attacked(model, x, y, Pgd(steps=10, restarts=10), Threat("linf", eps))
    left = np.where(np.arange(len(y)) % 2 == 0, small, large)
    clear = np.abs(left) > 1e-5
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert (found.distance <= eps.numpy() + 1e-6).all()
