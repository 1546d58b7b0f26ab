"""Minimum-norm attacks against distances that are known exactly, their cost, and what is made of their distances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Linear, digits, exact_distance, half_space, slack, softmax_regression
from torch import Tensor, nn

import robustkit
from robustkit import Threat
from robustkit.attacks.counting import CountedModel
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.losses import cross_entropy, margin, soft_margin
from robustkit.attacks.minimum_norm.closest import HAIR, Closest
from robustkit.attacks.minimum_norm.ddn import Ddn, ddn
from robustkit.attacks.minimum_norm.fmn import Fmn, fmn
from robustkit.attacks.minimum_norm.pdpgd import Pdpgd, pdpgd, proximal
from robustkit.attacks.minimum_norm.polish import CLEAR
from robustkit.attacks.minimum_norm.sigma_zero import SigmaZero, sigma_zero
from robustkit.attacks.projection import distances
from robustkit.errors import AttackError, UsageError
from robustkit.evaluation.distances import POINTS, MinimumDistances
from robustkit.recipe.norms import ATTACK_NORMS, INSTEAD
from robustkit.registry import create, find

Run = Callable[..., tuple[Tensor, Tensor]]
CASES = [("fmn", "linf"), ("fmn", "l2"), ("fmn", "l1"), ("ddn", "l2"), ("pdpgd", "linf"), ("pdpgd", "l2"),
         ("pdpgd", "l1"), ("sigma_zero", "l0")]  # fmt: skip
every = pytest.mark.parametrize(("name", "norm"), CASES)
CONVEX = [case for case in CASES if case[1] != "l0"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smallest(name: str, norm: str, model: nn.Module, x: Tensor, y: Tensor, **given: int) -> tuple[Tensor, np.ndarray]:
    """Run one of the functions and return its images and distances, in float64."""
    steps = {"steps": 60, **given}
    if name in ("ddn", "sigma_zero"):
        images, found = (ddn if name == "ddn" else sigma_zero)(model, x, y, generator=generator(), **steps)
    else:
        images, found = (fmn if name == "fmn" else pdpgd)(model, x, y, norm, generator=generator(), **steps)  # type: ignore[arg-type]
    return images, found.numpy().astype(np.float64)


def right(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        index = model(x).argmax(1) == y
    return x[index], y[index]


@pytest.mark.parametrize("count", [300, pytest.param(None, marks=pytest.mark.slow, id="all")])
@every
def test_distances_on_real_digits_are_the_closed_form(name: str, norm: str, count: int | None) -> None:
    """The excess is what the attack asks of the margin: CLEAR of the largest logit, and the bits of its sum."""
    model = softmax_regression()
    x, y = right(model, *(part[:count] for part in digits()))
    images, found = smallest(name, norm, model, x, y)
    exact = exact_distance(model, x, y, norm)
    assert np.isfinite(found).all()
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert (model(images).argmax(1) != y).all()
    np.testing.assert_allclose(distances(images - x, norm).numpy(), found, rtol=1e-6)
    clear = exact > 1e-3
    assert clear.sum() > 0.9 * len(y)
    assert (found[clear] >= exact[clear] * (1 - 1e-5)).all(), "closer than any image that fools the model"
    if norm == "l0":
        assert (found == exact).all()
        return
    # What the best image of that size has beyond the boundary, in logits.
    wasted = -slack(model, x, y, norm, found)
    allowed = 2 * CLEAR * model(images).detach().abs().amax(1).double().numpy()
    assert (wasted <= allowed).all()
    assert (found[clear] <= exact[clear] * 1.002).all()


@pytest.mark.parametrize("dimensions", [3, 64, 3072])
@pytest.mark.parametrize(("name", "norm"), CONVEX)
def test_the_boundary_of_a_half_space_is_found(name: str, norm: str, dimensions: int) -> None:
    model = half_space(dimensions).float()
    x, y = torch.full((2, dimensions), 0.75), torch.ones(2, dtype=torch.int64)
    exact = {"linf": 0.25, "l2": 0.25 * dimensions**0.5, "l1": 0.25 * dimensions}[norm]
    _, found = smallest(name, norm, model, x, y)
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    assert (found >= exact * (1 - 1e-5)).all()


class Sphere(nn.Module):
    """Class 1 outside of a sphere of radius 1/4 around the middle of the box, class 0 inside."""

    def forward(self, x: Tensor) -> Tensor:
        outside = (x.flatten(1) - 0.5).square().sum(1) - 1 / 16
        return torch.stack([-outside, outside], 1)


@pytest.mark.parametrize("name", ["fmn", "ddn", "pdpgd"])
def test_the_distance_to_a_sphere_is_found_from_both_sides(name: str) -> None:
    direction = torch.randn(40, 30, generator=generator())
    radius = torch.linspace(0.05, 0.45, 40)[:, None]
    x = 0.5 + radius * direction / direction.norm(dim=1, keepdim=True)
    y = Sphere()(x).argmax(1)
    _, found = smallest(name, "l2", Sphere(), x, y)
    exact = (radius.squeeze(1) - 0.25).abs().numpy()
    assert (found >= exact * (1 - 1e-4)).all()
    np.testing.assert_allclose(found, exact, rtol=0.01)


@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**20),
    size=st.integers(1, 12),
    grid=st.booleans(),
    classes=st.integers(2, 12),
)
def test_images_lie_in_the_box_and_no_closer_than_is_possible(
    case: tuple[str, str], seed: int, size: int, grid: bool, classes: int
) -> None:
    weight = torch.randn(classes, size, generator=generator(seed))
    model = Linear(weight, torch.randn(classes, generator=generator(seed + 1)) / 4)
    x = torch.rand(7, size, generator=generator(seed + 2))
    x, y = right(model, x.round() if grid else x, torch.randint(classes, (7,), generator=generator(seed + 3)))
    name, norm = case
    images, found = smallest(name, norm, model, x, y, steps=15)
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert ((model(images).argmax(1) != y).numpy() == np.isfinite(found)).all()
    assert (images[torch.from_numpy(np.isinf(found))] == x[torch.from_numpy(np.isinf(found))]).all()
    # By the logits' last bits an image may fool the model in float32 a hair before the boundary.
    room = slack(model, x, y, norm, np.where(np.isinf(found), 0, found))
    assert (room[np.isfinite(found)] <= 1e-5 * (1 + float(weight.abs().max()))).all()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small CNN trained for a moment on the digits."""
    torch.manual_seed(0)
    x, y = (part[:600] for part in digits())
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@settings(deadline=None, max_examples=10)
@given(case=st.sampled_from(CASES), first=st.integers(0, 1700), steps=st.integers(1, 12))
def test_more_restarts_never_find_a_larger_distance(
    network: nn.Module, case: tuple[str, str], first: int, steps: int
) -> None:
    x, y = right(network, *(part[first : first + 30] for part in digits()))
    found = [smallest(*case, network, x, y, steps=steps, restarts=restarts)[1] for restarts in (1, 2, 3)]
    assert (found[1] <= found[0]).all()
    assert (found[2] <= found[1]).all()


@every
def test_more_steps_find_smaller_distances(
    network: nn.Module, name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the search itself, without the last stretch, which hides what a short search leaves."""
    monkeypatch.setattr("robustkit.attacks.minimum_norm.run.polish", lambda found: None)
    x, y = right(network, *(part[:200] for part in digits()))
    few, more, many = (smallest(name, norm, network, x, y, steps=steps)[1] for steps in (10, 50, 250))
    assert np.isfinite(many).all()
    assert many.mean() < more.mean() < few.mean()


@every
def test_no_look_makes_it_worse(network: nn.Module, name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    look = Closest.look

    def watched(self: Closest, images: Tensor, logits: Tensor) -> Tensor:
        fooled = look(self, images, logits)
        assert torch.equal(distances(self.best - self.x, norm)[fooled], self.shortest[fooled])
        seen.append(self.shortest)
        return fooled

    monkeypatch.setattr(Closest, "look", watched)
    smallest(name, norm, network, *right(network, *(part[:40] for part in digits())), steps=20)
    found = torch.stack(seen)
    assert (found[1:] <= found[:-1]).all()
    assert (found[-1] < found[20]).any(), "the last stretch shortens something"


@every
def test_no_ball_that_pgd_breaks_is_much_smaller(network: nn.Module, name: str, norm: str) -> None:
    """What is called the smallest distance is held against an attack within a ball a tenth smaller."""
    x, y = right(network, *(part[:150] for part in digits()))
    _, found = smallest(name, norm, network, x, y, steps=200)
    eps = torch.from_numpy(np.floor(0.9 * found) if norm == "l0" else 0.9 * found).float()
    inside = Pgd(steps=40, restarts=3)(network, x, y, Threat(norm, eps), generator=generator())  # type: ignore[arg-type]
    assert (network(inside).argmax(1) == y).float().mean() >= 0.8


class Then(nn.Module):
    """A function of a model's logits."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model(x))


@every
def test_neither_sure_models_nor_probabilities_hide_anything(
    network: nn.Module, name: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = right(network, *(part[:100] for part in digits()))
    _, plain = smallest(name, norm, Then(network, lambda z: 3 * z), x, y)
    _, softmax = smallest(name, norm, Then(network, lambda z: (3 * z).softmax(1)), x, y)
    assert np.isfinite(softmax).all()
    assert np.median(softmax) == pytest.approx(np.median(plain), rel=0.02)
    _, loud = smallest(name, norm, Then(network, lambda z: 1e4 * z), x, y)
    assert np.isfinite(loud).all()
    # Of such logits the soft margin is the margin itself, whose direction knows no scale.
    monkeypatch.setattr("robustkit.attacks.minimum_norm.closest.soft_margin", margin)
    _, hard = smallest(name, norm, network, x, y)
    assert np.median(loud) == pytest.approx(np.median(hard), rel=0.01)


class Stubborn(nn.Module):
    """Always class 0 of ten, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        ten = torch.arange(10.0).flip(0)[None] * 1000
        return ten + x.flatten(1).sum(1, keepdim=True) * torch.arange(10.0)


@every
@pytest.mark.parametrize(("steps", "restarts"), [(1, 1), (7, 3)])
def test_it_costs_what_is_said_and_finds_nothing_where_there_is_nothing(
    name: str, norm: str, steps: int, restarts: int
) -> None:
    x, y = torch.rand(6, 12, generator=generator()), torch.zeros(6, dtype=torch.int64)
    model = CountedModel(Stubborn())
    images, found = smallest(name, norm, model, x, y, steps=steps, restarts=restarts)
    bits = 4  # of 12
    assert model.forwards == 6 * restarts * (steps + (3 + 3 * bits if norm == "l0" else 21))
    assert model.backwards == 6 * restarts * (steps + 1 + 9)
    assert np.isinf(found).all()
    assert torch.equal(images, x)


@every
def test_nan_logits_fool_nobody(name: str, norm: str) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sum(1)
            return torch.stack([total, total / 0 * 0], 1)

    images, found = smallest(name, norm, Broken(), torch.rand(3, 5), torch.zeros(3, dtype=torch.int64), steps=3)
    assert np.isinf(found).all()
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("attack", [Fmn(), Ddn(), Pdpgd(), SigmaZero()])
def test_a_model_without_gradient_and_a_foreign_norm_are_errors(attack: Fmn | Ddn | Pdpgd | SigmaZero) -> None:
    model = softmax_regression()
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    norm = attack.norms[-1]
    with pytest.raises(AttackError, match="no gradient"):
        attack(_Blind(model), x, y, Threat(norm, 1), generator=generator())
    for other in {"linf", "l2", "l1", "l0"} - set(attack.norms):
        with pytest.raises(AttackError, match=f"the threat is {other}"):
            attack(model, x, y, Threat(other, 1), generator=generator())  # type: ignore[arg-type]


class _Blind(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).detach()
        return logits


def test_a_recipe_knows_the_norms_of_every_attack() -> None:
    for name, norms in ATTACK_NORMS.items():
        attack = create(find("attack", name), {})
        if getattr(attack, "minimum_norm", False):
            assert attack.norms == norms  # type: ignore[attr-defined]
        for other in {"linf", "l2", "l1", "l0"} - set(norms):
            with pytest.raises(AttackError, match="works under"):
                attack(  # type: ignore[operator]
                    softmax_regression(), torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), Threat(other, 1),  # type: ignore[arg-type]
                    generator=generator(),
                )  # fmt: skip
    assert all(norm in ATTACK_NORMS[name] for norm, name in INSTEAD.items())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_proximal_operators_have_the_lowest_objective(norm: str) -> None:
    change = torch.randn(5, 1, 3, 4, generator=generator(), dtype=torch.float64)
    found = proximal(change, norm, 0.7)  # type: ignore[arg-type]

    def objective(z: Tensor) -> Tensor:
        return 0.7 * distances(z, norm) + (z - change).square().flatten(1).sum(1) / 2

    for seed in range(200):
        near = found + 10.0 ** -(seed % 5) * torch.randn(change.shape, generator=generator(seed), dtype=torch.float64)
        assert (objective(found) <= objective(near) + 1e-9).all()
    assert (proximal(0.01 * change, norm, 0.7) == 0).all() or norm == "linf"  # type: ignore[arg-type]


def test_what_a_set_of_distances_says() -> None:
    found = MinimumDistances("l2", np.array([0, 0.5, 0.25, np.inf, 1.0], dtype=np.float32))
    assert found.median == 0.5
    assert found.found == 0.75
    assert [found.accuracy(eps) for eps in (0, 0.25, 0.3, 1, 9)] == [0.8, 0.6, 0.6, 0.2, 0.2]
    assert found.curve() == ([0.0, 0.25, 0.5, 1.0], [0.8, 0.6, 0.4, 0.2])
    lost = MinimumDistances("l2", np.array([np.inf, np.inf, 0.1], dtype=np.float32))
    assert lost.summary().median is None
    assert json.loads(lost.summary().model_dump_json())["accuracy"] == [1.0, pytest.approx(2 / 3)]
    assert MinimumDistances("l2", np.zeros(3, dtype=np.float32)).found == 1
    many = MinimumDistances("l1", np.random.default_rng(0).random(5000).astype(np.float32))
    eps, accuracy = many.curve()
    assert len(eps) <= POINTS + 1
    assert accuracy == [float((many.values > one).mean()) for one in eps]
    assert accuracy[-1] == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_minimum_distances_of_a_model(norm: str) -> None:
    x, y = (part[:200] for part in digits())
    model = softmax_regression()
    found = robustkit.minimum_distances(model, x, y, norm)  # type: ignore[arg-type]
    exact = exact_distance(model, x, y, norm)
    clean = (model(x).argmax(1) == y).numpy()
    assert ((found.values == 0) == ~clean).all()
    np.testing.assert_allclose(found.values[clean], exact[clean], rtol=0.01, atol=1e-4)
    assert found.median == pytest.approx(float(np.sort(exact)[99]), rel=0.01)
    again = robustkit.minimum_distances(model, x.mul(16).round().div(16).numpy(), y.numpy(), norm, batch_size=37)  # type: ignore[arg-type]
    np.testing.assert_allclose(again.values, found.values, rtol=1e-3, atol=1e-5)


def test_minimum_distances_says_what_is_wrong() -> None:
    x, y = (part[:5] for part in digits())
    with pytest.raises(UsageError, match="not for the smallest"):
        robustkit.minimum_distances(softmax_regression(), x, y, attack="pgd")
    with pytest.raises(AttackError, match="ddn works under l2"):
        robustkit.minimum_distances(softmax_regression(), x, y, "linf", attack="ddn")
    with pytest.raises(UsageError, match="unknown norm"):
        robustkit.minimum_distances(softmax_regression(), x, y, "l3")  # type: ignore[arg-type]


def test_one_run_gives_the_accuracy_at_every_eps() -> None:
    x, y = (part[:300] for part in digits())
    model = softmax_regression()
    found = robustkit.evaluate(model, x, y, threat=Threat("linf", 0.1), attacks=["fmn", "pgd"])
    assert list(found.distances) == ["fmn"]
    assert found.outcomes["pgd"].minimal_distance is None
    minimal = found.outcomes["fmn"].minimal_distance
    assert minimal is not None
    assert found.distances["fmn"].accuracy(0.1) == found.attacks["fmn"].value
    assert (found.outcomes["fmn"].correct == (minimal > 0.1 * (1 + 1e-4) + 1e-6)).all()
    assert found.outcomes["fmn"].projected == 0
    assert not [flag for flag in found.flags if flag.id == "E1"]
    assert "median" in repr(found)
    for eps in (0.02, 0.05, 0.15):
        left = slack(model, x, y, "linf", eps)
        sure = np.abs(left) > 0.02
        assert ((minimal > eps) == ((left > 0) & (minimal > 0)))[sure].all()
        other = robustkit.evaluate(model, x, y, threat=Threat("linf", eps), attacks=["fmn"])
        assert other.attacks["fmn"].value == found.distances["fmn"].accuracy(eps)


def test_a_run_reports_median_and_curve(tmp_path: Path) -> None:
    recipe = """
name: distances
data: {digits: {limit: 200}}
model: {small_cnn: {widths: [8]}}
threat: {norm: l2, eps: 0.5}
train: {epochs: 2}
variants: {baseline: }
evaluate: {examples: 40, attacks: [ddn: {steps: 20}, noise], eps_curve: [0, 0.5], latency: false}
"""
    results = robustkit.run(recipe, runs=tmp_path)
    (row,) = results.variants
    found = row.distances["ddn"]
    folder = tmp_path / "distances"
    with np.load(folder / str(row.arrays)) as arrays:
        values, correct = arrays["distance/ddn"], arrays["correct/ddn"]
    assert found.median == MinimumDistances("l2", values).median
    assert found.n == 40
    assert (correct == (values > 0.5 * (1 + 1e-4) + 1e-6)).all()
    assert found.accuracy[0] == row.clean.value
    text = (folder / "report.md").read_text()
    assert f"| baseline | ddn | l2 | {found.median:.4g} |" in text
    assert "Minimal distances" in (folder / "report.html").read_text()
    assert f",{found.median}," in (folder / "results.csv").read_text()
    assert json.loads((folder / "results.json").read_text())["variants"][0]["distances"]["ddn"]["eps"] == found.eps


def test_the_soft_margin_goes_where_cross_entropy_goes() -> None:
    logits = torch.randn(20, 7, generator=generator(), dtype=torch.float64, requires_grad=True)
    y = torch.arange(20) % 7
    (soft,) = torch.autograd.grad(soft_margin(logits, y).sum(), logits)
    (entropy,) = torch.autograd.grad(cross_entropy(logits, y).sum(), logits)
    torch.testing.assert_close(nn.functional.normalize(soft), nn.functional.normalize(entropy))
    (sure,) = torch.autograd.grad(soft_margin(1e6 * logits, y).sum(), logits)
    assert (sure.abs().amax(1) >= 1e6 * (1 - 1e-9)).all()


def test_a_hair_is_more_than_the_last_bit() -> None:
    assert CLEAR > HAIR > 4 * torch.finfo(torch.float32).eps
