"""Projection and random draws: closed forms, optimality, and independence from the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from robustkit.attacks import draws
from robustkit.attacks.projection import l2_direction, project_, random_extreme, random_start, within
from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError
from robustkit.evaluation.attacked import distances

NORMS = ["linf", "l2", "l1"]
SHAPES = [(5, 7), (3, 1, 8, 8), (4, 3, 5, 6)]
norms = pytest.mark.parametrize("norm", NORMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=60)
@given(
    norm=st.sampled_from(NORMS),
    shape=st.sampled_from(SHAPES),
    eps=st.floats(0, 1),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**20),
)
def test_within_stays_in_ball_and_box_and_keeps_what_is_inside(
    norm: str, shape: tuple[int, ...], eps: float, spread: float, seed: int
) -> None:
    x = torch.rand(shape, generator=generator(seed))
    far = x + spread * torch.randn(shape, generator=generator(seed + 1))
    threat = Threat(norm, eps)  # type: ignore[arg-type]
    found = within(x, far, threat)
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (distances(found - x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(within(x, found, threat), found, rtol=1e-4, atol=1e-5)
    ball = project_((far - x).clone(), threat)
    assert (distances(ball, norm) <= eps * (1 + 1e-5) + 1e-6).all()


@norms
@pytest.mark.parametrize("eps", [0.1, 0.5, 1.0])
def test_within_is_the_closest_point(norm: str, eps: float) -> None:
    x = torch.rand(6, 8, generator=generator(3), dtype=torch.float64).round(decimals=1)
    far = x + torch.randn(6, 8, generator=generator(4), dtype=torch.float64)
    found = within(x, far, Threat(norm, eps)).numpy()  # type: ignore[arg-type]
    for row in range(6):
        expected = _closest(x[row].numpy(), far[row].numpy(), norm, eps)
        own = np.linalg.norm(found[row] - far[row].numpy())
        assert own <= np.linalg.norm(expected - far[row].numpy()) + 2e-3


def _closest(x: np.ndarray, far: np.ndarray, norm: str, eps: float) -> np.ndarray:
    """The same by a general solver, in variables up - down = change."""
    size = len(x)
    room = [(0, 1 - value) for value in x] + [(0, value) for value in x]
    if norm == "linf":
        room = [(0, min(high, eps)) for _, high in room]

    def change(z: np.ndarray) -> np.ndarray:
        return z[:size] - z[size:]

    def budget(z: np.ndarray) -> float:
        return float(eps - z.sum()) if norm == "l1" else float(eps**2 - (change(z) ** 2).sum())

    constraints = [] if norm == "linf" else [{"type": "ineq", "fun": budget}]
    solved = optimize.minimize(
        lambda z: ((x + change(z) - far) ** 2).sum(),
        np.full(2 * size, 1e-3),
        bounds=room,
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return np.asarray(x + change(solved.x))


def test_an_l2_step_is_as_long_however_small_the_gradient_is() -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=generator())
    expected = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for scale in (1e6, 1.0, 1e-12, 1e-25, 1e-36):
        torch.testing.assert_close(l2_direction(gradient * scale), expected)
    assert not bool(l2_direction(torch.zeros(2, 1, 4, 4)).any())


@norms
def test_random_draws_use_the_ball(norm: str) -> None:
    x = torch.full((4000, 3), 0.5) + 1e-4 * torch.randn(4000, 3, generator=generator(8))
    threat = Threat(norm, 0.2)  # type: ignore[arg-type]
    inside = distances(random_start(x, threat, generator()) - x, norm).numpy()
    edge = distances(random_extreme(x, threat, generator()) - x, norm).numpy()
    np.testing.assert_allclose(edge, 0.2, rtol=1e-3)
    # In three dimensions the distance of a uniform point of a ball has the distribution r**3.
    assert stats.kstest((inside / 0.2) ** 3, "uniform").pvalue > 1e-3
    change = random_start(x, threat, generator(1)) - x
    assert change.mean(0).abs().max() < 0.01
    assert torch.corrcoef(change.T).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.parametrize("draw", [draws.uniform, draws.normal])
def test_draws_belong_to_the_example(draw: object) -> None:
    x = torch.rand(50, 3, 8, 8, generator=generator(1))
    order = torch.randperm(50, generator=generator(2))

    def drawn(images: Tensor, seed: int = 0) -> Tensor:
        result: Tensor = draw(images, generator(seed))  # type: ignore[operator]
        return result

    whole = drawn(x)
    torch.testing.assert_close(drawn(x[order]), whole[order], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([drawn(x[:7]), drawn(x[7:])]), whole, rtol=0, atol=0)
    assert not torch.equal(drawn(x, 1), whole)
    assert len(torch.unique(whole)) > 0.99 * whole.numel()


def test_draws_have_the_right_distribution() -> None:
    x = torch.rand(200, 500, generator=generator(1))
    source = generator(5)
    first, second = draws.uniform(x, source), draws.uniform(x, source)
    assert stats.kstest(first.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.normal(x, source).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(draws.radial(x, source).flatten().numpy(), "uniform").pvalue > 1e-3
    for one, other in ((first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:])):
        assert abs(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]) < 0.02
    similar = draws.uniform(torch.stack([x[0], x[0] + 1e-6]), source)
    assert abs(np.corrcoef(similar.numpy())[0, 1]) < 0.2


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from(SHAPES), eps=st.integers(0, 12), spread=st.floats(0, 3), seed=st.integers(0, 2**20))
def test_under_l0_the_closest_image_has_the_values_that_go_farthest(
    shape: tuple[int, ...], eps: int, spread: float, seed: int
) -> None:
    x = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    far = x + spread * torch.randn(shape, generator=generator(seed + 1), dtype=torch.float64)
    found = within(x, far, Threat("l0", eps))
    assert (distances(found - x, "l0") <= eps).all()
    # Changing a value saves (far - x)^2 - (far - nearest)^2, each by itself: the largest savings are the best.
    saved = ((far - x).square() - (far - far.clamp(0, 1)).square()).flatten(1).sort(1, descending=True).values
    expected = (far - x).square().flatten(1).sum(1) - saved[:, :eps].sum(1)
    torch.testing.assert_close((far - found).square().flatten(1).sum(1), expected)
    ball = project_((far - x).clone(), Threat("l0", eps))
    assert (distances(ball, "l0") <= eps).all()
    assert ((ball == 0) | (ball == far - x)).all()


def test_random_images_under_l0_have_as_many_new_values_as_the_budget_allows() -> None:
    x = 0.25 + torch.rand(1700, 1, 4, 4, generator=generator(1)) / 2
    eps = torch.arange(1700) % 17
    for draw in (random_start, random_extreme):
        found = draw(x, Threat("l0", eps), generator())
        assert torch.equal(distances(found - x, "l0"), eps.float())
        changed = (found != x).float()[eps == 8].mean(0)
        assert (changed - 0.5).abs().max() < 0.25, "some values are drawn more than others"
        assert torch.equal(draw(x[7:9], Threat("l0", eps[7:9]), generator()), found[7:9])
    assert set(found[found != x].tolist()) == {0.0, 1.0}


def test_a_threat_says_what_is_wrong_with_its_eps() -> None:
    for eps, message in (
        (-0.1, "at least 0"),
        (float("nan"), "at least 0"),
        (float("inf"), "at least 0"),
        (8, "8/255"),
        (torch.tensor([0.1, -0.2]), "at least 0"),
        (torch.tensor([0.1, 8.0]), "8/255"),
        (torch.ones(2, 2), "one per example"),
    ):
        with pytest.raises(UsageError, match=message):
            Threat("linf", eps)
    with pytest.raises(UsageError, match="unknown norm"):
        Threat("l3", 0.1)  # type: ignore[arg-type]
    assert Threat("l1", 20).eps_for(torch.zeros(2, 3)).tolist() == [[20], [20]]
