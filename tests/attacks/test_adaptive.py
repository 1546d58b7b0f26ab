"""BPDA and EOT: exact forward, the gradient that was asked for, and a verdict by the model itself."""

from __future__ import annotations

import pytest
import torch
from oracles import digits, slack, softmax_regression
from torch import Tensor, nn

import robustkit
from robustkit.attacks.adaptive import Bpda, Eot, Through
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.square import Square
from robustkit.attacks.threat import Threat
from robustkit.errors import ModelError, UsageError


def rounded(x: Tensor) -> Tensor:
    return (x * 15).round() / 15


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(model(x)[:, 3].sum(), x)
    return found


def test_bpda_goes_forward_through_the_preprocessing_and_backward_around_it() -> None:
    x, _ = digits()
    x = x[:20] * 0.97
    model = softmax_regression()
    view = Bpda(rounded, model)
    assert torch.equal(view(x), model(rounded(x)))
    assert torch.equal(gradient(view, x), gradient(model, rounded(x)))
    soft = Bpda(rounded, model, lambda x: 3 * x)
    assert torch.equal(soft(x), model(rounded(x)))
    assert torch.allclose(gradient(soft, x), 3 * gradient(model, rounded(x)))


def test_bpda_says_where_it_needs_a_surrogate() -> None:
    x, _ = digits()
    view = Bpda(lambda x: torch.cat([x, x], 1), nn.Flatten())
    with pytest.raises(ModelError, match="surrogate"):
        view(x[:2])


def test_bpda_finds_what_rounding_hides() -> None:
    """Digits lie on sixteenths: within 0.1 a pixel is rounded to at most two of these away, so that the closed form of
    the linear model for 2/16 is the truth."""
    x, y = (part[:300] for part in digits())
    model, threat = softmax_regression(), Threat("linf", 0.1)
    hidden = nn.Sequential(Rounding(), model)
    attacks = {"pgd": Pgd(), "bpda": Through(Pgd(restarts=10), lambda _: Bpda(sixteenths, model))}
    found = robustkit.evaluate(hidden, x, y, threat=threat, attacks=attacks)
    truth = float((found.outcomes["clean"].correct & (slack(model, x, y, "linf", 2 / 16) > 0)).mean())
    assert found.attacks["bpda"].value == pytest.approx(truth, abs=0.01)
    assert found.attacks["pgd"].value > truth + 0.3


def sixteenths(x: Tensor) -> Tensor:
    return (x * 16).round() / 16


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sixteenths(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = softmax_regression(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(x + 0.3 * torch.randn_like(x))
        return logits


def test_eot_is_the_mean_of_its_passes() -> None:
    x, _ = digits()
    x, model = x[:50], Noisy().requires_grad_(False)
    torch.manual_seed(0)
    whole = Eot(model, 5)(x)
    torch.manual_seed(0)
    assert torch.allclose(whole, torch.stack([model(x) for _ in range(5)]).mean(0), atol=1e-5)
    assert model.calls == 10
    assert torch.allclose(Eot(model.inner, 7)(x), model.inner(x), atol=1e-5)
    torch.manual_seed(1)
    spread = {passes: float(torch.stack([Eot(model, passes)(x) for _ in range(30)]).var(0).mean()) for passes in (1, 9)}
    assert spread[9] == pytest.approx(spread[1] / 9, rel=0.2)
    with pytest.raises(UsageError, match="passes"):
        Eot(model, 0)


def test_what_is_found_on_a_view_counts_only_if_the_model_is_fooled() -> None:
    x, y = (part[:100] for part in digits())
    model = softmax_regression()
    upside_down = nn.Sequential(model, Minus())
    found = robustkit.evaluate(
        model, x, y, threat=Threat("linf", 0.1), attacks={"away": Through(Pgd(), lambda _: upside_down), "pgd": Pgd()}
    )
    assert found.attacks["away"].value > 0.9
    assert found.attacks["pgd"].value < 0.7


class Minus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_random_numbers_are_those_of_the_attack_within() -> None:
    def own(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x

    assert Through(Square(), lambda model: model).seeded_by_example
    assert not Through(own, lambda model: model).seeded_by_example
