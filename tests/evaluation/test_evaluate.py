"""`robustkit.evaluate`: right figures, honest costs, and a model that is left exactly as it was found."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import robustkit
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.errors import AttackError, ModelError, UsageError
from robustkit.evaluation.attacked import clean_outcome
from robustkit.evaluation.curve import security_curve

CPU = torch.device("cpu")


class HalfSpaces(nn.Module):
    """Two classes apart at mean(x) = 1/2: under linf the margin of x is exactly |mean(x) - 1/2|."""

    def __init__(self, pixels: int = 16) -> None:
        super().__init__()
        self.head = nn.Linear(pixels, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.stack([-torch.ones(pixels), torch.ones(pixels)]) / pixels)
            self.head.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Constant images at known distances from the boundary: 0.01, 0.02, ..., 0.20 above it."""
    means = 0.5 + torch.arange(1, 21) / 100
    return means[:, None, None, None].expand(20, 1, 4, 4).clone(), torch.ones(20, dtype=torch.int64)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_accuracy_under_attack_is_the_closed_form(
    attack: str, batch_size: int, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    found = robustkit.evaluate(
        HalfSpaces(), x, y, threat=robustkit.Threat("linf", 0.105), attacks=[attack], seed=0, batch_size=batch_size
    )
    assert found.clean.value == 1.0
    assert found.outcomes[attack].correct.tolist() == [False] * 10 + [True] * 10
    assert found.worst.value == 0.5
    assert found.attacks[attack].value == 0.5
    # Clopper & Pearson 1934 for 10 of 20, from the beta distribution's table.
    assert (round(found.worst.low, 4), round(found.worst.high, 4), found.worst.n) == (0.2720, 0.7280, 20)


def test_the_worst_case_is_per_example(images: tuple[Tensor, Tensor]) -> None:
    """Two attacks that fool different halves leave nobody, though each leaves a half."""

    def up_to(count: int) -> Any:
        def attack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
            model(x)
            flip = (x.flatten(1).mean(1) < 0.601) == (count == 0)
            return torch.where(flip[:, None, None, None], x - 0.2, x)

        return attack

    x, y = images
    x = x.clamp(max=0.695)
    found = robustkit.evaluate(
        HalfSpaces(), x, y, threat=Threat("linf", 0.2), attacks={"low": up_to(0), "high": up_to(1)}
    )
    assert found.attacks["low"].value == 0.5
    assert found.attacks["high"].value == 0.5
    assert found.worst.value == 0.0
    assert not found.correct.any()


def test_costs_are_examples_summed_over_all_calls(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    found = robustkit.evaluate(
        HalfSpaces(), x, y, threat=Threat("linf", 1e-4), attacks={"pgd": {"steps": 7, "restarts": 3}, "fgsm": None}
    )
    # Nobody is fooled: each restart asks steps + 1 times, and the result is checked once more.
    assert found.outcomes["pgd"].forwards == 20 * (3 * 8 + 1)
    assert found.outcomes["pgd"].backwards == 20 * 3 * 7
    assert (found.outcomes["fgsm"].forwards, found.outcomes["fgsm"].backwards) == (40, 20)
    assert found.outcomes["pgd"].seconds > 0


def test_names_parameters_and_objects(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    attacks = ["noise", {"pgd": {"steps": 3, "as": "short"}}, Pgd(steps=5)]
    found = robustkit.evaluate(HalfSpaces(), x, y, threat=Threat("linf", 0.1), attacks=attacks)
    assert list(found.outcomes) == ["clean", "noise", "short", "pgd"]
    mapped = robustkit.evaluate(
        HalfSpaces(), x, y, threat=Threat("linf", 0.1), attacks={"mine": Pgd(steps=5), "pgd": {"steps": 5}}
    )
    assert list(mapped.outcomes) == ["clean", "mine", "pgd"]
    assert "worst" in repr(mapped)


def test_numpy_and_bytes_are_images_too(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    whole = (x * 255).round()
    first = robustkit.evaluate(HalfSpaces(), whole / 255, y, threat=Threat("linf", 0.1), attacks=["pgd"])
    second = robustkit.evaluate(
        HalfSpaces(), whole.to(torch.uint8).numpy(), y.numpy(), threat=Threat("linf", 0.1), attacks=["pgd"]
    )
    assert first.worst == second.worst


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.full((20, 1, 4, 4), 2.0)}, r"not in \[0, 1\]"),
        ({"x": torch.rand(20, 1, 4, 4) - 0.5}, "normalization"),
        ({"x": torch.zeros(20)}, "one row an example"),
        ({"x": torch.zeros(20, 1, 4, 4, dtype=torch.int32)}, "uint8"),
        ({"y": torch.zeros(19, dtype=torch.int64)}, "20 images but 19 labels"),
        ({"y": torch.rand(20)}, "class numbers"),
        ({"y": torch.full((20,), 7)}, "the model has 2 classes"),
        ({"x": torch.zeros(0, 1, 4, 4), "y": torch.zeros(0, dtype=torch.int64)}, "no images"),
        ({"attacks": ["pdg"]}, "did you mean .*'pgd'"),
        ({"attacks": [{"pgd": {"stesp": 1}}]}, "did you mean 'steps'"),
        ({"attacks": [{"pgd": {"steps": "many"}}]}, "steps"),
        ({"attacks": ["pgd", "pgd"]}, "another label"),
        ({"attacks": [3]}, "no attack"),
        ({"threat": ("linf", 0.1)}, "Threat"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_a_call_that_makes_no_sense_says_so(
    change: dict[str, Any], message: str, images: tuple[Tensor, Tensor]
) -> None:
    given: dict[str, Any] = {"x": images[0], "y": images[1], "threat": Threat("linf", 0.1), **change}
    x, y = given.pop("x"), given.pop("y")
    with pytest.raises(UsageError, match=message):
        robustkit.evaluate(HalfSpaces(), x, y, **given)


def test_a_model_without_logits_says_so(images: tuple[Tensor, Tensor]) -> None:
    for broken in (lambda x: x.flatten(1)[:, :1], lambda x: "text", lambda x: torch.zeros(3, 2)):
        with pytest.raises(ModelError, match="logits"):
            robustkit.evaluate(broken, *images, threat=Threat("linf", 0.1))


def test_an_attack_that_cheats_does_not_count(images: tuple[Tensor, Tensor]) -> None:
    def too_far(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x * 0

    def negative(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x - 5

    def nan(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x * torch.nan

    x, y = images
    found = robustkit.evaluate(
        HalfSpaces(), x, y, threat=Threat("linf", 0.1), attacks={"far": too_far, "negative": negative, "nan": nan}
    )
    assert found.worst.value == 1.0
    assert [found.outcomes[label].projected for label in ("far", "negative", "nan")] == [20, 20, 20]
    assert sum(flag.id == "E1" for flag in found.flags) == 3

    def wrong_shape(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x[:1]

    with pytest.raises(AttackError, match="returned"):
        robustkit.evaluate(HalfSpaces(), x, y, threat=Threat("linf", 0.1), attacks={"wrong": wrong_shape})


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grads": [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        "wants": [one.requires_grad for one in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "python": random.getstate(),
        "enabled": torch.is_grad_enabled(),
    }


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


class Vandal:
    """Changes everything that an attack can reach, then may raise."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        model.train()
        model(x)
        torch.manual_seed(99)
        np.random.seed(99)
        random.seed(99)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(x).sum().backward()
        x.zero_()
        if self.raises:
            raise RuntimeError("the attack fell over")
        return x


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_left_exactly_as_it_was(raises: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    nn.functional.cross_entropy(model(x), y).backward()
    kept = x.clone()
    before = state(model)
    if raises:
        with pytest.raises(RuntimeError, match="fell over"):
            robustkit.evaluate(model, x, y, threat=Threat("linf", 0.1), attacks={"vandal": Vandal(True)})
    else:
        robustkit.evaluate(model, x, y, threat=Threat("linf", 0.1), attacks={"vandal": Vandal(False), "pgd": {}})
    assert equal(before, state(model))
    assert torch.equal(x, kept)


def digits_model(strength: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN trained on real digits in a second; `strength` trains it on FGSM images."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images / 16).float()[:, None]
    y = torch.from_numpy(bunch.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        index = torch.randint(0, 1200, (128,))
        batch, labels = x[index], y[index]
        if strength:
            batch = batch.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(batch), labels), batch)
            noise = (torch.rand_like(batch) - 0.5) * strength
            batch = (batch + noise + strength * gradient.sign()).detach().clamp(0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    return model.eval(), x[1200:], y[1200:]


def flags_of(
    model: nn.Module, x: Tensor, y: Tensor, attacks: Any = ("noise", "fgsm", "pgd"), eps: float = 0.1
) -> set[str]:
    found = robustkit.evaluate(model, x, y, threat=Threat("linf", eps), attacks=attacks)
    return {flag.id for flag in found.flags if flag.severity != "note"}


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_no_flag_on_sound_models(strength: float) -> None:
    model, x, y = digits_model(strength)
    assert flags_of(model, x[:300], y[:300], {"noise": {}, "fgsm": {}, "pgd": {"loss": "ce", "restarts": 2}}) == set()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Quantized(Wrapped):
    """Rounds its input: no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 15).round() / 15)


class Noisy(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + 0.5 * torch.randn_like(logits)


class Probabilities(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class Saturated(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 1000


class OnBatch(Wrapped):
    """Depends on the other images of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits - 0.5 * logits.mean(0, keepdim=True)


class NotFinite(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 0


class Shattered(Wrapped):
    """Adds a fast wave to the image: gradients point anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.02 * torch.sin(5e4 * x))


class GradientOff(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach()) + 0 * x.flatten(1)[:, :1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Quantized, {"P9"}),
        (GradientOff, {"P9"}),
        (Noisy, {"P1"}),
        (Probabilities, {"P2"}),
        (Saturated, {"P10"}),
        (OnBatch, {"P7"}),
        (NotFinite, {"P8"}),
    ],
)
def test_models_that_hide_their_gradients_are_flagged(kind: type[Wrapped], expected: set[str]) -> None:
    model, x, y = digits_model()
    assert expected <= flags_of(kind(model).eval(), x[:200], y[:200], ["noise", "fgsm"])


def test_shattered_gradients_are_seen_by_an_attack_that_needs_none() -> None:
    model, x, y = digits_model()
    square = {"torchattacks.Square": {"n_queries": 100, "as": "square"}}
    assert "E3" in flags_of(Shattered(model).eval(), x[:100], y[:100], ["noise", "fgsm", {"pgd": {"steps": 5}}, square])


def test_a_dead_end_for_gradients_is_seen_by_the_unbounded_attack() -> None:
    class Plateau(Wrapped):
        """Confident wherever the gradient says so; wrong only far away, where no gradient leads."""

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            best = logits.argmax(1, keepdim=True).detach()
            return torch.zeros_like(logits).scatter(1, best, 30.0) + 1e-6 * x.flatten(1)[:, :1] * logits.detach()

    model, x, y = digits_model()
    assert "E7" in flags_of(Plateau(model).eval(), x[:100], y[:100], ["fgsm"])


def test_the_security_curve_is_the_closed_form_and_falls() -> None:
    means = 0.5 + torch.arange(1, 21) / 100
    x, y = means[:, None, None, None].expand(20, 1, 4, 4).clone(), torch.ones(20, dtype=torch.int64)
    model = HalfSpaces()
    clean = clean_outcome(model, x, y, batch_size=8, device=CPU)
    eps = [0.2501, 0.0, 0.055, 0.155]
    curve = security_curve(model, x, y, Pgd(steps=10), "linf", eps, clean=clean, seed=0, batch_size=8, device=CPU)
    assert curve == [0, 20, 15, 5]


def test_a_tensor_of_eps_attacks_each_example_with_its_own(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    eps = torch.where(torch.arange(20) % 2 == 0, 0.3, 1e-4)
    found = robustkit.evaluate(HalfSpaces(), x, y, threat=Threat("linf", eps), attacks=["pgd", "fgsm"])
    assert found.correct.tolist() == [number % 2 == 1 for number in range(20)]


def test_torchattacks_by_name(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    found = robustkit.evaluate(
        HalfSpaces(), x, y, threat=Threat("linf", 0.105), attacks=[{"torchattacks.PGD": {"steps": 20, "as": "ta"}}]
    )
    assert found.attacks["ta"].value == 0.5
