"""What gradient attacks cost, when they stop, and what they say where they cannot run."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import digits, half_space, softmax_regression
from torch import Tensor, nn

from robustkit.attacks.apgd import Apgd
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.gradient import Fgsm, Pgd, fgsm, pgd
from robustkit.attacks.losses import cross_entropy, margin, margin_to, wrong_classes
from robustkit.attacks.noise import Noise
from robustkit.attacks.threat import Attack, Threat
from robustkit.errors import AttackError, UsageError

THREAT = Threat("linf", 0.05)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Unbreakable(nn.Module):
    """Always sure of class 0, with a small gradient."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        return torch.stack([100 + 0 * total, 0.001 * total], 1)


@pytest.mark.parametrize(("steps", "restarts"), [(1, 1), (7, 1), (5, 3)])
def test_pgd_spends_one_forward_a_step_and_one_more_for_the_last_image(steps: int, restarts: int) -> None:
    model = CountedModel(Unbreakable())
    pgd(model, torch.rand(6, 12), torch.zeros(6, dtype=torch.int64), THREAT, steps=steps, restarts=restarts,
        generator=generator())  # fmt: skip
    assert model.forwards == 6 * restarts * (steps + 1)
    assert model.backwards == 6 * restarts * steps


def test_fgsm_spends_one_forward_and_one_backward_and_noise_no_backward() -> None:
    model = CountedModel(Unbreakable())
    x, y = torch.rand(6, 12), torch.zeros(6, dtype=torch.int64)
    Fgsm()(model, x, y, THREAT, generator=generator())
    assert (model.forwards, model.backwards) == (6, 6)
    Noise(tries=4)(model, x, y, THREAT, generator=generator())
    assert (model.forwards, model.backwards) == (6 + 24, 6)


def test_fooled_examples_leave_the_batch_at_once() -> None:
    """The j-th example lies j steps from the boundary, so that one leaves after each step."""
    sizes: list[int] = []

    class Sizes(CountedModel):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    model = Sizes(half_space(4).float())
    x = (0.5 + 0.01 * torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5]))[:, None].expand(5, 4)
    attack = Pgd(steps=6, alpha=0.01, random_start=False)
    found = attack(model, x, torch.ones(5, dtype=torch.int64), Threat("linf", 0.06), generator=generator())
    assert sizes == [5, 5, 4, 3, 2, 1]
    assert (model.forwards, model.backwards) == (20, 19)
    torch.testing.assert_close((x - found)[:, 0], 0.01 * torch.arange(1.0, 6.0), rtol=0, atol=1e-5)


def test_noise_stops_for_fooled_examples() -> None:
    model = CountedModel(half_space(4).float())
    x = torch.tensor([0.9, 0.5001])[:, None].expand(2, 4)
    Noise(tries=30)(model, x, torch.ones(2, dtype=torch.int64), THREAT, generator=generator())
    assert 30 <= model.forwards < 60


def test_the_best_iterate_is_kept() -> None:
    """With steps that overshoot, the last image is worse than one before."""

    class Valley(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = 1 - (x.flatten(1) - 0.53).square().sum(1) * 100
            return torch.stack([torch.full_like(value, 2.0), value], 1)

    model, x = Valley(), torch.full((1, 1), 0.5)
    y = torch.zeros(1, dtype=torch.int64)
    reached = []
    for steps in range(1, 6):
        found = pgd(model, x, y, Threat("linf", 0.1), steps=steps, alpha=0.05, generator=generator(), start=False)
        reached.append(float(margin(model(found), y)))
    assert reached == sorted(reached)
    assert reached[-1] > float(margin(model(x), y))


@pytest.mark.parametrize("shape", [(12,), (3, 4), (1, 3, 4), (3, 2, 2)])
@pytest.mark.parametrize("classes", [2, 3, 17])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_any_shape_any_number_of_classes(shape: tuple[int, ...], classes: int, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    x = torch.rand(9, *shape)
    y = model(x).argmax(1)
    for attack in (Noise(tries=3), Fgsm(), Fgsm("margin"), Pgd(steps=3, restarts=2), Pgd(steps=3, loss="ce")):
        found = attack(model, x, y, Threat(norm, 0.3), generator=generator())  # type: ignore[arg-type]
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert not found.requires_grad


def test_the_largest_of_equal_steps_and_default_step() -> None:
    x, y = (part[:100] for part in digits())
    model = softmax_regression()

    def run(**given: float | int | None) -> Tensor:
        return Pgd(**given)(model, x, y, THREAT, generator=generator())  # type: ignore[arg-type]

    torch.testing.assert_close(run(steps=10), run(steps=10, relative_step=0.25), rtol=0, atol=0)
    torch.testing.assert_close(run(steps=10, alpha=0.0125), run(steps=10, relative_step=0.25))
    assert not torch.equal(run(steps=10), run(steps=10, alpha=0.001))


def test_contradicting_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="alpha and relative_step"):
        Pgd(alpha=0.1, relative_step=0.1)
    with pytest.raises(UsageError, match="random_start"):
        Pgd(restarts=2, random_start=False)


@pytest.mark.parametrize("attack", [Fgsm(), Pgd()])
def test_a_model_without_gradient_is_an_error_that_says_what_to_do(attack: Fgsm | Pgd) -> None:
    inner = softmax_regression()
    x = digits()[0][:5]
    trainable = copy.deepcopy(inner)
    for model in (Detached(inner), Detached(trainable, head=True)):
        y = model(x).argmax(1)
        with pytest.raises(AttackError, match=r"no gradient.*square"):
            attack(model, x, y, THREAT, generator=generator())


class Detached(nn.Module):
    """Cuts the gradient to the images; with `head`, parameters after the cut still have one."""

    def __init__(self, inner: nn.Module, head: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(10, 10) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x).detach())
        return logits


def test_attacks_work_under_no_grad_and_leave_no_gradient_behind() -> None:
    x, y = (part[:20] for part in digits())
    model = copy.deepcopy(softmax_regression())
    with torch.no_grad():
        found = pgd(model, x, y, THREAT, steps=5, generator=generator())
        single = fgsm(model, x, y, THREAT)
    assert not torch.equal(found, x)
    assert not torch.equal(single, x)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attack", [Fgsm(), Pgd(steps=10, loss="ce", random_start=False), Apgd(steps=20)])
def test_a_sure_model_does_not_stall_l2_steps_up_the_cross_entropy(attack: Attack) -> None:
    """At a margin of 60 the gradient is about 1e-25: the squares of its entries are zero in float32."""
    direction = torch.randn(16, generator=generator())
    direction = 150 * direction / direction.norm()
    x = torch.full((4, 16), 0.5) + 0.02 * torch.randn(4, 16, generator=generator(1))
    model = nn.Linear(16, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(16), direction]))
        model.bias.copy_(torch.stack([direction.sum() / 2 + 60, torch.zeros(())]))
    assert (model(x)[:, 0] - model(x)[:, 1]).min() > 40
    found = attack(model, x, torch.zeros(4, dtype=torch.int64), Threat("l2", 0.5), generator=generator())
    assert (model(found).argmax(1) == 1).all()


def test_nan_logits_are_not_success() -> None:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1) * torch.nan, x.flatten(1).sum(1)], 1)

    x = torch.rand(3, 4)
    found = pgd(Nan(), x, torch.zeros(3, dtype=torch.int64), THREAT, steps=3, generator=generator())
    assert torch.equal(found, x)


def test_losses() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    y = torch.tensor([1, 2])
    assert margin(logits, y).tolist() == [-1.0, 5.0]
    assert margin_to(logits, y, torch.tensor([0, 1])).tolist() == [-2.0, 1.0]
    assert wrong_classes(logits, y).tolist() == [[2, 0], [0, 1]]
    torch.testing.assert_close(cross_entropy(logits, y).sum(), nn.functional.cross_entropy(logits, y, reduction="sum"))


def test_counting_sees_every_backward_of_any_attack() -> None:
    model = CountedModel(softmax_regression())
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    logits = model(x)
    for number in range(3):
        torch.autograd.grad(logits[:, number].sum(), x, retain_graph=True)
    logits.sum().backward()
    with torch.no_grad():
        model(x)
    assert (model.forwards, model.backwards) == (8, 16)
