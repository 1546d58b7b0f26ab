"""Randomized smoothing against a base classifier whose smoothed radius is known in closed form."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

import robustkit
from robustkit.attacks.draws import Stream
from robustkit.attacks.threat import Threat
from robustkit.certificates.certificate import ABSTAINED
from robustkit.certificates.smoothing import (
    RandomizedSmoothing,
    certified_radius,
    lower_confidence_bound,
    sample_under_noise,
    smoothed_certificate,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles

SIGMA = 0.25


def half_space() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier of two classes, images, labels, and each image's distance to the boundary.

    Noise on a half-space is noise on a line: the smoothed classifier is the same half-space, so that its radius is the
    distance (Cohen et al. 2019, appendix B).
    """
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, generator=generator)
    bias = -0.5 * weight.sum()
    model = oracles.Linear(torch.stack([-weight, weight]), torch.stack([-bias, bias])).eval()
    x = torch.rand(400, 1, 8, 8, generator=generator)
    side = x.flatten(1) @ weight + bias
    return model, x, (side > 0).to(torch.int64), side.abs() / weight.norm()


@pytest.mark.parametrize(("trials", "alpha"), [(1, 0.05), (10, 0.001), (100, 0.05), (1000, 0.3)])
def test_the_lower_bound_is_exact(trials: int, alpha: float) -> None:
    """A share as low as the bound would give as many successes with probability alpha, neither more nor less."""
    counts = np.arange(trials + 1)
    bounds = lower_confidence_bound(counts, trials, alpha)
    assert bounds[0] == 0
    assert (np.diff(bounds) > 0).all()
    assert np.allclose(binom.sf(counts[1:] - 1, trials, bounds[1:]), alpha, rtol=1e-6)
    assert bounds[-1] == pytest.approx(alpha ** (1 / trials))


def test_the_radius_is_the_normal_quantile() -> None:
    bounds = np.array([0.0, 0.5, 0.500001, 0.9, 0.999])
    radius = certified_radius(2.0, bounds)
    assert (radius[:2] == 0).all()
    assert np.allclose(radius[2:], 2 * norm.ppf(bounds[2:]))


def test_the_certified_radius_does_not_exceed_the_true_one() -> None:
    model, x, y, distance = half_space()
    found, radius = smoothed_certificate(
        model, x, sigma=SIGMA, first=50, samples=2000, alpha=0.01, generator=torch.Generator().manual_seed(0)
    )
    known = found != ABSTAINED
    too_far = int((known & (radius > distance)).sum()) + int((known & (found != y)).sum())
    # Each is wrong with probability 1 % at most: more than this many of 400 have probability 0.1 %.
    assert too_far <= binom.ppf(0.999, len(x), 0.01)
    near = (distance > 0.1) & (distance < 0.5)
    assert near.sum() > 100
    assert (radius[near] / distance[near]).mean() > 0.85


def test_a_bound_that_is_wrong_half_of_the_time_is_seen_to_be() -> None:
    """The check above can fail: at alpha = 1/2 about half of the radii are too long."""
    model, x, _, distance = half_space()
    _, radius = smoothed_certificate(
        model, x, sigma=SIGMA, first=50, samples=2000, alpha=0.5, generator=torch.Generator().manual_seed(0)
    )
    near = (distance > 0.02) & (distance < 0.5)
    assert 0.35 < (radius > distance)[near].double().mean() < 0.65


def test_shares_under_noise_are_those_of_the_closed_form() -> None:
    model, x, y, distance = half_space()
    stream = Stream(x, torch.Generator().manual_seed(1))
    counts = sample_under_noise(model, x, stream, SIGMA, 1000)
    assert (counts.sum(1) == 1000).all()
    share = counts.gather(1, y[:, None]).squeeze(1).numpy() / 1000
    true = norm.cdf(distance.numpy() / SIGMA)
    deviations = (share - true) / np.sqrt(true * (1 - true) / 1000 + 1e-9)
    assert abs(deviations.mean()) < 0.15
    assert 0.85 < deviations[true < 0.99].std() < 1.15


def test_an_example_on_the_boundary_is_abstained_from() -> None:
    model, x, y, distance = half_space()
    weight = model.layer.weight[1] / model.layer.weight[1].norm()
    step = torch.where(y > 0, -distance, distance)[:, None] * weight
    found, radius = smoothed_certificate(
        model, x + step.view(x.shape), sigma=SIGMA, first=50, samples=500, alpha=0.01, generator=torch.Generator()
    )
    assert (found == ABSTAINED).double().mean() > 0.95
    assert (radius[found == ABSTAINED] == 0).all()


def test_what_an_example_gets_does_not_depend_on_its_company() -> None:
    model, x, y, _ = half_space()
    threat = Threat("l2", 0.2)
    certificates = [{"randomized_smoothing": {"sigma": SIGMA, "n": 100, "n0": 10}}]
    whole = robustkit.certify(model, x, y, threat=threat, certificates=certificates)
    parts = robustkit.certify(model, x, y, threat=threat, certificates=certificates, batch_size=37)
    back = robustkit.certify(model, x.flip(0), y.flip(0), threat=threat, certificates=certificates)
    one, two, three = (found.outcomes["randomized_smoothing"] for found in (whole, parts, back))
    assert np.array_equal(one.radius, two.radius)
    assert np.array_equal(one.radius, three.radius[::-1])
    assert one.forwards == 110 * len(x)
    assert np.array_equal(one.radius, robustkit.certify(model, x, y, threat=threat, certificates=certificates)
                          .outcomes["randomized_smoothing"].radius)  # fmt: skip


@pytest.mark.parametrize(("norm_", "factor"), [("l2", 1.0), ("l1", 1.0), ("linf", 8.0)])
def test_other_balls_count_by_the_l2_ball_around_them(norm_: str, factor: float) -> None:
    model, x, y, _ = half_space()
    eps = 0.3 / factor
    found = RandomizedSmoothing(sigma=SIGMA, n0=20, n=500)(
        model, x, y, Threat(norm_, eps), generator=torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(found.certified, (found.prediction == y) & (found.radius > 0.3))
    assert 0.05 < found.certified.double().mean() < 0.95


def test_noise_that_breaks_the_logits_counts_for_no_class() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 3), torch.nan)

    found, radius = smoothed_certificate(
        Broken(), torch.rand(4, 5), sigma=1.0, first=5, samples=20, alpha=0.01, generator=torch.Generator()
    )
    assert (found == ABSTAINED).all()
    assert (radius == 0).all()
