"""Adversarial images of 8 bits: on the grid, in the ball, and less than a level from what the attack found."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import robustkit
from robustkit.attacks.projection import within
from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError
from robustkit.evaluation.attacked import audited, distances
from robustkit.evaluation.rounding import rounded

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles


def on_grid(x: Tensor) -> bool:
    return bool(((x * 255) - (x * 255).round()).abs().max() < 1e-3)


@given(
    seed=st.integers(0, 2**31 - 1),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.one_of(st.floats(0, 0.3), st.integers(0, 40).map(lambda k: k / 255)),
)
@settings(max_examples=150, deadline=None)
def test_a_rounded_image_is_on_the_grid_and_in_the_ball(seed: int, norm: str, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (5, 1, 4, 4), generator=generator, dtype=torch.uint8).float() / 255
    threat = Threat(norm, eps)  # type: ignore[arg-type]
    found = within(x, x + (torch.rand(x.shape, generator=generator) - 0.5), threat)
    kept, length, outside = audited(found, x, threat, "test", quantize=True)
    assert not outside
    assert on_grid(kept)
    assert kept.min() >= 0
    assert kept.max() <= 1
    budget = eps * (1 + 1e-4) + 1e-6
    assert (distances(kept - x, norm) <= budget + 1e-6).all()
    assert torch.allclose(length, distances(kept - x, norm))
    # Never a whole level from what was found, and never on the other side of the clean image.
    assert ((kept - found).abs() < 1 / 255 + 1e-6).all()
    assert ((kept - x) * (found - x) >= -1e-9).all()


def test_nearest_where_it_fits_else_towards_the_clean_image() -> None:
    x = torch.full((1, 4), 100 / 255)
    found = x + torch.tensor([[7.4, -7.6, 8.0, 0.3]]) / 255
    budget = torch.tensor([7.9 / 255])
    kept = rounded(found, x, "linf", torch.tensor([8 / 255 + 1e-6]))
    assert torch.allclose((kept - x) * 255, torch.tensor([[7.0, -8.0, 8.0, 0.0]]), atol=1e-3)
    kept = rounded(found.clamp(x - 7.9 / 255, x + 7.9 / 255), x, "linf", budget)
    assert torch.allclose((kept - x) * 255, torch.tensor([[7.0, -7.0, 7.0, 0.0]]), atol=1e-3)


def test_under_l2_and_l1_the_room_goes_to_the_nearest_first() -> None:
    x = torch.zeros(1, 3)
    found = torch.tensor([[1.9, 1.6, 0.8]]) / 255
    room = torch.tensor([(1.9 + 1.6 + 0.8) / 255])
    kept = rounded(found, x, "l1", room)
    assert torch.allclose(kept * 255, torch.tensor([[2.0, 1.0, 1.0]]), atol=1e-3)
    kept = rounded(found, x, "l2", torch.linalg.vector_norm(found, dim=1))
    assert torch.allclose(kept * 255, torch.tensor([[2.0, 1.0, 1.0]]), atol=1e-3)


def test_an_image_at_the_edge_of_the_ball_on_the_grid_stays_where_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(50, 200, (8, 100), generator=generator).float() / 255
    for norm in ("l2", "l1"):
        moved = x + torch.randint(-5, 6, x.shape, generator=generator) / 255
        budget = distances(moved - x, norm) * (1 + 1e-4) + 1e-6
        assert torch.allclose(rounded(moved, x, norm, budget), moved, atol=1e-6)  # type: ignore[arg-type]


def test_images_that_are_not_of_eight_bits_are_refused() -> None:
    x, y = oracles.digits()
    model = oracles.softmax_regression()
    with pytest.raises(UsageError, match="multiples of 1/255"):
        robustkit.evaluate(model, x[:50], y[:50], threat=Threat("linf", 0.05), quantize_input=True)


def test_what_counts_is_what_is_left_after_rounding() -> None:
    """A change below half a level is rounded away; one of 8 levels is not."""
    x, y = oracles.digits()
    x = (x[:300] * 255).round().to(torch.uint8)
    model = oracles.softmax_regression(100.0)
    tiny = Threat("linf", 0.49 / 255)
    plain = robustkit.evaluate(model, x, y[:300], threat=tiny, attacks=["pgd"])
    bits = robustkit.evaluate(model, x, y[:300], threat=tiny, attacks=["pgd"], quantize_input=True)
    assert bits.worst.value == bits.clean.value >= plain.worst.value
    assert bits.quantized
    assert "rounded to 8 bits" in repr(bits)
    assert "rounded" not in repr(plain)
    threat = Threat("linf", 8 / 255)
    plain = robustkit.evaluate(model, x, y[:300], threat=threat, attacks=["pgd"])
    bits = robustkit.evaluate(model, x, y[:300], threat=threat, attacks=["pgd"], quantize_input=True)
    # An extreme point of this ball is on the grid, so that rounding to it takes little from a strong attack.
    assert plain.worst.value - 0.01 <= bits.worst.value < bits.clean.value
    exact = oracles.slack(model, x.float() / 255, y[:300], "linf", 8 / 255) > 0
    assert np.count_nonzero(exact & ~bits.correct) == 0
