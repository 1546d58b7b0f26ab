"""One table through which every attack of robustkit goes: budget, state, randomness, monotony, device."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks import active
from robustkit.attacks.threat import Attack, Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome, distances
from robustkit.evaluation.outcome import Outcome
from robustkit.models.small_cnn import SmallCnn

CPU = torch.device("cpu")
EPS = {"linf": 0.1, "l2": 0.6, "l1": 3.0, "l0": 3.0}
BALLS = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Case:
    """One attack with parameters under one norm; `more`: parameters that must never fool fewer examples."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "linf"
    more: Mapping[str, Any] | None = None
    draws: bool = True
    least: float = 0.1
    """Share of the examples that it fools in any case."""

    @property
    def id(self) -> str:
        return "-".join([self.name, self.norm, *(f"{key}={value}" for key, value in self.parameters.items())])

    def make(self, changed: Mapping[str, Any] | None = None) -> Attack:
        entry = registry.find("attack", self.name)
        clean, problems = registry.check_parameters(entry, {**self.parameters, **(changed or {})})
        assert not problems
        attack: Attack = registry.create(entry, clean)
        return attack

    def threat(self, factor: float = 1.0) -> Threat:
        return Threat(self.norm, factor * EPS[self.norm])  # type: ignore[arg-type]


CASES = [
    *(Case("noise", {"tries": 3}, norm, {"tries": 6}) for norm in EPS),
    *(Case("fgsm", {}, norm, draws=False) for norm in EPS),
    Case("fgsm", {"loss": "margin"}, draws=False),
    *(Case("pgd", {"steps": 5}, norm, {"restarts": 3}) for norm in EPS),
    Case("pgd", {"steps": 5, "loss": "ce", "restarts": 2}, more={"restarts": 4}),
    Case("pgd", {"steps": 5, "alpha": "8/255"}, more={"restarts": 3}),
    Case("pgd", {"steps": 5, "relative_step": 0.3, "random_start": False}, more={"steps": 9}, draws=False),
    Case("pgd", {"steps": 5, "relative_step": 0.3, "random_start": False}, "l2", more={"steps": 9}, draws=False),
    *(Case("apgd", {"steps": 8}, norm, {"restarts": 2}) for norm in BALLS),
    Case("apgd", {"steps": 8, "loss": "dlr", "eot": 2}),
    *(Case("square", {"n_queries": 100}, norm, {"n_queries": 150}, least=0.01) for norm in BALLS),
    *(Case("cascade", {"budget": "quick"}, norm) for norm in BALLS),
    Case("cascade", {}),
    *(Case("autoattack", {"steps": 4, "n_queries": 10}, norm) for norm in BALLS),
    Case("autoattack", {"version": "plus", "steps": 2, "n_queries": 4}),
    *(Case("fmn", {"steps": 20}, norm, {"restarts": 2}, draws=False) for norm in BALLS),
    *(Case("pdpgd", {"steps": 20}, norm, {"restarts": 2}, draws=False) for norm in BALLS),
    Case("ddn", {"steps": 20}, "l2", {"restarts": 2}, draws=False),
    Case("sigma_zero", {"steps": 20}, "l0", {"restarts": 2}, draws=False),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
# Nothing leaves on the meta device, so that the long attacks run whole; one operation there takes as long as any.
LONG = ("square", "cascade", "autoattack")
LONG_ON_META = (*LONG, "fmn", "pdpgd", "ddn", "sigma_zero")
META = [
    pytest.param(case, marks=pytest.mark.slow if case.name in LONG_ON_META else ())
    for case in CASES
    if case.id not in ("cascade-linf", "autoattack-linf-version=plus-steps=2-n_queries=4")
]


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images / 16).to(torch.float32)[:400, None]
    return pixels, torch.from_numpy(bunch.target)[:400].to(torch.int64)


@pytest.fixture(scope="module")
def model(images: tuple[Tensor, Tensor]) -> nn.Module:
    """A small CNN with batch norm and dropout, trained for a moment on the digits."""
    torch.manual_seed(0)
    x, y = images
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * 36, 10)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.train()


def run(case: Case, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, **given: Any) -> tuple[Outcome, Outcome]:
    batch_size = given.pop("batch_size", 128)
    threat = given.pop("threat", None) or case.threat()
    clean = clean_outcome(model, x, y, batch_size=batch_size, device=CPU)
    attack = given.pop("attack", None) or case.make()
    found = attack_outcome(
        model, x, y, attack, threat, clean=clean, seed=seed, label="a", batch_size=batch_size, device=CPU,
        keep=given.pop("keep", 0),
    )  # fmt: skip
    assert not given
    return clean, found


def test_every_built_in_attack_is_in_the_table() -> None:
    assert set(registry.BUILTIN["attack"]) == {case.name for case in CASES}


@every
def test_results_are_in_ball_and_box_and_never_better_than_clean(
    case: Case, model: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    clean, found = run(case, model, x, y, keep=len(x))
    assert found.adversarial is not None
    assert found.projected == 0
    change = found.adversarial - x
    assert (found.adversarial >= 0).all()
    assert (found.adversarial <= 1).all()
    length = distances(change, case.norm)
    assert (length <= EPS[case.norm] * (1 + 1e-5) + 1e-6).all()
    near = np.ones(len(x), dtype=bool)
    if found.minimal_distance is not None:
        # What lies beyond eps was put back for the images, not for the distances.
        near = found.minimal_distance <= EPS[case.norm]
        assert (found.correct == ~(found.minimal_distance <= EPS[case.norm] * (1 + 1e-4) + 1e-6)).all()
    np.testing.assert_allclose(found.distance[near], length.numpy()[near], atol=1e-5)
    assert not (found.correct & ~clean.correct).any()
    assert (change[~torch.from_numpy(clean.correct)] == 0).all(), "an example that was wrong already was touched"
    assert (found.prediction[~clean.correct] == clean.prediction[~clean.correct]).all()
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert (copied(found.adversarial).argmax(1).numpy() == found.prediction).mean() > 0.999
    if case.name != "noise":
        assert found.correct.mean() < clean.correct.mean() - case.least, "the attack does nothing"


@every
def test_batch_size_and_order_do_not_matter(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    _, whole = run(case, model, x, y, batch_size=400)
    _, pieces = run(case, model, x, y, batch_size=33)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(5))
    _, mixed = run(case, model, x[order], y[order], batch_size=100)
    # Sums in another order differ in the last bit, which may tip an example on the boundary.
    assert (whole.correct != pieces.correct).sum() <= 1
    assert (whole.correct[order.numpy()] != mixed.correct).sum() <= 1
    assert whole.forwards == pytest.approx(pieces.forwards, rel=0.01)


@every
def test_the_same_seed_gives_the_same_bits(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:100] for part in images)
    first, again, other = (run(case, model, x, y, seed=seed, keep=100)[1].adversarial for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert torch.equal(first, other) is not case.draws


@pytest.mark.parametrize("case", [case for case in CASES if case.more], ids=lambda case: case.id)
def test_more_effort_never_fools_fewer(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    _, less = run(case, model, x, y)
    _, more = run(case, model, x, y, attack=case.make(case.more))
    assert not (more.correct & ~less.correct).any()
    assert more.forwards > less.forwards


@every
def test_a_budget_of_nothing_changes_nothing(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:60] for part in images)
    clean, found = run(case, model, x, y, threat=Threat(case.norm, 0.0), keep=60)  # type: ignore[arg-type]
    assert found.adversarial is not None
    torch.testing.assert_close(found.adversarial, x, rtol=0, atol=1e-6)
    assert (found.correct == clean.correct).all()


@every
def test_classes_may_be_renamed(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:150] for part in images)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    renamed = nn.Sequential(copy.deepcopy(model), Reordered(order))
    _, before = run(case, model, x, y)
    _, after = run(case, renamed, x, order.argsort()[y])
    assert (before.correct != after.correct).sum() <= 1


class Reordered(nn.Module):
    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.order]


def everything(model: nn.Module) -> dict[str, Any]:
    numbers = np.random.get_state()
    return {
        "modes": [module.training for module in model.modules()],
        "required": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": [id(one) for one in [*model.parameters(), *model.buffers()]],
        "torch": torch.get_rng_state(),
        "numpy": [numbers[1].tolist(), numbers[2]],  # type: ignore[index,union-attr]
        "python": random.getstate(),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@every
def test_the_model_is_left_as_it_was(case: Case, model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = (part[:64] for part in images)
    network = copy.deepcopy(model).train()
    network[1].eval()  # type: ignore[index]
    next(iter(network.parameters())).requires_grad_(False)
    nn.functional.cross_entropy(network(x), y).backward()
    before = everything(network)
    run(case, network, x, y)
    assert same(before, everything(network))


@every
def test_flat_vectors_and_two_classes(case: Case) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.rand(50, 6)
    _, found = run(case, network, x, network(x).argmax(1))
    assert found.correct.shape == (50,)
    assert found.projected == 0


@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(CASES),
    eps=st.floats(0, 1),
    size=st.integers(1, 9),
    seed=st.integers(0, 1000),
    grid=st.booleans(),
)
def test_whatever_the_model_and_eps_the_budget_holds(case: Case, eps: float, size: int, seed: int, grid: bool) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.rand(size, 3, 2, 2)
    x = x.round() if grid else x
    y = torch.randint(3, (size,))
    eps = float(round(12 * eps)) if case.norm == "l0" else eps
    clean, found = run(case, network, x, y, threat=Threat(case.norm, eps))  # type: ignore[arg-type]
    assert found.projected == 0
    assert not (found.correct & ~clean.correct).any()


@pytest.mark.parametrize("case", META, ids=lambda case: case.id)
def test_a_step_waits_for_the_device_only_to_drop_fooled_examples(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a hidden .item(), or a tensor left on the CPU, raises."""
    calls = []

    def all_of_them(robust: Tensor) -> Tensor:
        calls.append(robust.shape[0])
        return torch.arange(robust.shape[0], device=robust.device)

    for module in ("search", "noise", "apgd", "square", "cascade", "autoattack"):
        monkeypatch.setattr(f"robustkit.attacks.{module}.survivors", all_of_them)
    network = SmallCnn(shape=(3, 16, 16), classes=10).to("meta").eval()
    x = torch.rand(4, 3, 16, 16, device="meta")
    y = torch.zeros(4, dtype=torch.int64, device="meta")
    budgets: tuple[float | Tensor, ...] = (1.0, torch.full((4,), 0.1, device="meta"))
    for eps in budgets[1:] if case.name in LONG else budgets:
        found = case.make()(network, x, y, Threat(case.norm, eps), generator=torch.Generator())  # type: ignore[arg-type]
        assert found.device.type == "meta"
        assert found.shape == x.shape
    assert calls or case.name == "fgsm" or getattr(case.make(), "minimum_norm", False)
    assert active.survivors(torch.tensor([True, False, True])).tolist() == [0, 2]
