"""Accuracy under common corruptions, from Python."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import robustkit
from robustkit import stats
from robustkit.data.corruptions import CORRUPTIONS
from robustkit.errors import ModelError, UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles


def test_the_mean_is_over_all_corruptions_severities_and_examples() -> None:
    x, y = oracles.digits()
    x, y = x[:300], y[:300]
    model = oracles.softmax_regression()
    found = robustkit.corrupted_accuracy(model, x, y, batch_size=64)
    assert list(found.by) == list(CORRUPTIONS)
    assert all(len(row) == 5 for row in found.by.values())
    assert found.mean.value == pytest.approx(np.mean([np.mean(row) for row in found.by.values()]))
    assert found.mean.low < found.mean.value < found.mean.high
    assert 0.3 < found.mean.value < found.clean.value
    assert found.by["gaussian_blur"][4] < found.by["gaussian_blur"][0]
    again = robustkit.corrupted_accuracy(model, x, y, batch_size=256)
    assert again.by == found.by, "the batch size changes nothing"
    assert "gaussian_noise" in repr(found)
    assert "mean" in repr(found)


def test_a_model_that_answers_at_random_is_right_by_chance_and_one_that_knows_one_class_as_often_as_that() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    x, y = oracles.digits()
    found = robustkit.corrupted_accuracy(Constant(), x, y, corruptions=["fog", "jpeg"])
    share = float((y == 3).double().mean())
    assert found.mean.value == pytest.approx(share)
    assert found.by["fog"] == pytest.approx([share] * 5)
    # As every example is right always or never, this is the interval of one accuracy.
    exact = stats.clopper_pearson(int((y == 3).sum()), len(y))
    assert (found.mean.low, found.mean.high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("shares", [[0.0] * 5, [1.0] * 5, [0.5] * 5, [0.0, 1.0, 0.2], [1 / 3] * 3, [0.1] * 10])
def test_the_interval_of_a_mean_holds_it(shares: list[float]) -> None:
    rate = stats.mean_of_shares(np.array(shares))
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.value == pytest.approx(np.mean(shares))
    assert rate.high > rate.low


def test_the_interval_of_a_mean_covers_the_true_one() -> None:
    """Of 400 samples of 40 shares each, at least 95 % have the true mean in their interval."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shares = generator.binomial(5, generator.beta(2, 1, 40)) / 5
        rate = stats.mean_of_shares(shares)
        covered += rate.low <= 2 / 3 <= rate.high
    assert covered >= 380


def test_mistakes() -> None:
    x, y = oracles.digits()
    model = oracles.softmax_regression()
    for given, message in ((["fgo"], "unknown corruption 'fgo'; known are"), ([], "no corruption is named")):
        with pytest.raises(UsageError, match=message):
            robustkit.corrupted_accuracy(model, x[:5], y[:5], corruptions=given)
    with pytest.raises(UsageError, match="batch_size"):
        robustkit.corrupted_accuracy(model, x[:5], y[:5], batch_size=0)
    with pytest.raises(UsageError, match="not in \\[0, 1\\]"):
        robustkit.corrupted_accuracy(model, 255 * x[:5], y[:5])
    with pytest.raises(ModelError, match="logits"):
        robustkit.corrupted_accuracy(lambda images: images, x[:5], y[:5])
