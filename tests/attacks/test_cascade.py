"""The cascade and the attacks of the audit against closed forms and against their published cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import digits, slack, softmax_regression
from torch import Tensor, nn

from robustkit.attacks.apgd import Apgd
from robustkit.attacks.autoattack import AutoAttack
from robustkit.attacks.cascade import Cascade
from robustkit.attacks.hyperplane import onto_hyperplane
from robustkit.attacks.losses import dlr, dlr_to, margin
from robustkit.attacks.schedules import SCHEDULES
from robustkit.attacks.square import Square
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.outcome import Outcome
from robustkit.recipe.cost import CASCADE, one_attack_passes
from robustkit.recipe.facts import Facts
from robustkit.recipe.spec import Use

CPU = torch.device("cpu")


def attacked(model: nn.Module, x: Tensor, y: Tensor, attack: object, threat: Threat) -> tuple[Outcome, Outcome]:
    clean = clean_outcome(model, x, y, batch_size=512, device=CPU)
    found = attack_outcome(
        model, x, y, attack, threat, clean=clean, seed=0, label="a", batch_size=512, device=CPU,  # type: ignore[arg-type]
    )  # fmt: skip
    return clean, found


@pytest.mark.parametrize("count", [300, pytest.param(None, marks=pytest.mark.slow, id="all")])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("linf", 0.1), ("l2", 0.3), ("l1", 0.5)])
def test_cascade_is_exact_on_real_digits(norm: str, eps: float, count: int | None) -> None:
    x, y = (part[:count] for part in digits())
    model = softmax_regression()
    left = slack(model, x, y, norm, eps)
    clean, found = attacked(model, x, y, Cascade(), Threat(norm, eps))  # type: ignore[arg-type]
    clear = np.abs(left) > (1e-5 if norm == "linf" else 1e-3)
    assert clear.sum() > 0.95 * len(y)
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert found.projected == 0


class Then(nn.Module):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        if self.kind == "loud":
            return 1e4 * logits
        return logits.softmax(1) if self.kind == "softmax" else logits.log_softmax(1)


@pytest.mark.parametrize("kind", ["loud", "softmax", "log_softmax"])
def test_no_scale_of_the_outputs_hides_anything(kind: str) -> None:
    x, y = (part[:250] for part in digits())
    model = softmax_regression()
    left = slack(model, x, y, "linf", 0.1)
    clean, found = attacked(Then(model, kind), x, y, Cascade(), Threat("linf", 0.1))
    clear = np.abs(left) > 1e-3
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()


def test_an_example_s_company_changes_nothing() -> None:
    """Not how many targets are climbed towards at once, nor whether others are polished before the search."""
    x, y = digits()
    model = softmax_regression()
    left = slack(model, x, y, "linf", 0.05)
    close = [int(one) for one in np.flatnonzero((left > 0) & (left < 0.02))[:3]]
    far = [int(one) for one in np.flatnonzero(left > 0.5)[:40]]
    assert len(close) == 3
    threat, attack = Threat("linf", 0.05), Cascade()

    def found(rows: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return attack(model, x[rows], y[rows], threat, generator=generator)

    together, apart = found(far + close), torch.cat([found(far), found(close)])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=0)
    torch.testing.assert_close(found(close[:1]), together[len(far)][None], atol=1e-6, rtol=0)


def test_what_has_no_gradient_is_searched() -> None:
    x, y = (part[:200] for part in digits())
    model = softmax_regression()

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = model(x.detach()).detach()
            return logits

    clean, found = attacked(Blind(), x, y, Cascade(), Threat("linf", 0.15))
    assert found.backwards == 0
    assert found.rate.value < clean.rate.value - 0.3


def test_an_undefended_network_costs_few_backwards() -> None:
    torch.manual_seed(0)
    x, y = digits()
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    _, found = attacked(network, x, y, Cascade(), Threat("linf", 0.3))
    assert found.rate.value < 0.01
    assert found.backwards <= 3 * len(y)


class Fixed(nn.Module):
    """Logits that no image within the ball can change the order of, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(10.0, device=x.device).flip(0)[None] * 100 + x.flatten(1).sum(1, keepdim=True) * torch.ones(
            10
        )


def test_autoattack_costs_what_its_parts_are_known_to_cost() -> None:
    """The original: 7,857 forwards with the clean pass and 1,910 backwards; it looks once more at APGD-T's result."""
    x, y = torch.rand(2, 4), torch.zeros(2, dtype=torch.int64)
    clean, found = attacked(Fixed(), x, y, AutoAttack(), Threat("linf", 0.1))
    assert found.correct.all()
    assert clean.forwards + found.forwards == 2 * 7856
    assert found.backwards == 2 * 1910


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3), ("l1", 0.5)])
def test_autoattack_is_exact_on_real_digits(norm: str, eps: float) -> None:
    x, y = (part[:100] for part in digits())
    model = softmax_regression()
    left = slack(model, x, y, norm, eps)
    clean, found = attacked(model, x, y, AutoAttack(n_queries=20), Threat(norm, eps))  # type: ignore[arg-type]
    clear = np.abs(left) > 1e-2
    assert (found.correct[clear] == (clean.correct & (left > 0))[clear]).all()
    assert AutoAttack(n_queries=20).notes
    assert not AutoAttack().notes


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_lowers_accuracy_without_gradients(norm: str) -> None:
    x, y = (part[:300] for part in digits())
    eps = {"linf": 0.1, "l2": 0.6, "l1": 2.0}[norm]
    clean, found = attacked(softmax_regression(), x, y, Square(n_queries=300), Threat(norm, eps))  # type: ignore[arg-type]
    assert found.backwards == 0
    assert found.projected == 0
    assert found.rate.value < clean.rate.value - 0.15


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_way_onto_a_hyperplane_is_the_shortest_in_the_box(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, normal = torch.rand(60, 12, generator=generator), torch.randn(60, 12, generator=generator)
    goal = torch.rand(60, 12, generator=generator)
    offset = (normal * goal).sum(1)  # a point of the box lies on each hyperplane
    change = onto_hyperplane(x, normal, offset, norm)  # type: ignore[arg-type]
    torch.testing.assert_close((normal * (x + change)).sum(1), offset, atol=1e-4, rtol=1e-4)
    assert ((x + change) >= -1e-6).all()
    assert ((x + change) <= 1 + 1e-6).all()
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    length = torch.linalg.vector_norm(change, ord=order, dim=1)
    assert (length <= torch.linalg.vector_norm(goal - x, ord=order, dim=1) + 1e-5).all()
    # A change that is a little shorter in every feasible direction cannot reach the plane.
    reach = 0.999 * length
    low, high = -x, 1 - x
    if norm == "linf":
        best = torch.maximum(normal * torch.maximum(low, -reach[:, None]), normal * torch.minimum(high, reach[:, None]))
        need = offset - (normal * x).sum(1)
        least = torch.minimum(
            normal * torch.maximum(low, -reach[:, None]), normal * torch.minimum(high, reach[:, None])
        )
        assert ((best.sum(1) < need) | (least.sum(1) > need) | (length < 1e-4)).all()


def test_dlr_does_not_see_scale_or_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator)
    y, target = torch.randint(10, (50,), generator=generator), torch.zeros(50, dtype=torch.int64)
    torch.testing.assert_close(dlr(7 * logits + 3, y), dlr(logits, y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dlr_to(7 * logits + 3, y, target), dlr_to(logits, y, target), rtol=1e-4, atol=1e-5)
    assert torch.equal(dlr(logits, y) > 0, margin(logits, y) > 0)
    torch.testing.assert_close(dlr(logits[:, :2], y % 2), margin(logits[:, :2], y % 2))


@pytest.mark.parametrize("budget", list(SCHEDULES))
def test_check_says_what_the_cascade_costs_at_most(budget: str) -> None:
    plan = SCHEDULES[budget]  # type: ignore[index]
    steps = [plan.probe, plan.direction, *[plan.target_steps] * plan.targets]
    steps += [plan.refine_steps] * plan.refine_targets + [plan.restart_steps] * plan.restarts * plan.refine_targets
    searches = [count + 1 for count in (plan.polish, plan.queries) if count]
    total = sum(2 * count + 1 for count in steps) + sum(searches)
    assert CASCADE[budget] == total


@pytest.mark.parametrize("name", ["square", "apgd", "autoattack"])
def test_check_says_what_the_others_cost_at_most(name: str) -> None:
    parameters = {"steps": 6, "n_queries": 9} if name != "square" else {"n_queries": 9}
    parameters = {"steps": 6} if name == "apgd" else parameters
    x, y = torch.rand(2, 4), torch.zeros(2, dtype=torch.int64)
    made = {"square": Square(n_queries=9), "apgd": Apgd(steps=6), "autoattack": AutoAttack(steps=6, n_queries=9)}
    defaults = {"restarts": 1, "eot": 1, "version": "standard"}

    def parameter(kind: str, use: Use, key: str) -> object:
        return parameters.get(key, defaults.get(key))

    said = one_attack_passes(Use(name=name, label=name), parameter, Facts(classes=10, channels=1, side=2, test=2))
    _, found = attacked(Fixed(), x, y, made[name], Threat("linf", 0.1))
    measured = (found.forwards + found.backwards) / 2
    assert measured <= said <= 10 * measured
