"""Mixing: images and targets mixed alike, boxes by area, shares as Beta asks, soft targets through every attack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.defenses.mixing import CutMix, Mixup, beta_shares, mix, partners, paste, random_boxes
from robustkit.train.hooks import Batch, Defense, Step
from robustkit.train.step import train_step

SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step_of(model: nn.Module, seed: int = 0) -> Step:
    return Step(model, 0, 1, 0.5, Threat("linf", 0.1), seeded(seed))


def coloured(count: int) -> tuple[Tensor, Tensor]:
    """Images of one gray each, whose label tells which: what is mixed can be read off."""
    y = torch.arange(count)
    return (y / count).view(-1, 1, 1, 1).expand(count, 2, 6, 4).clone(), y


def test_mix_by_hand() -> None:
    x, target = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.eye(2)
    images, labels = mix(x, target, torch.tensor([1, 0]), torch.tensor([0.75, 1.0]))
    assert images.flatten().tolist() == [0.25, 1.0]
    assert labels.tolist() == [[0.75, 0.25], [0.0, 1.0]]


def test_paste_by_hand() -> None:
    x, target = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]), torch.eye(2)
    box = torch.tensor([[[True, False], [False, False]], [[False, False], [False, False]]])
    images, labels = paste(x, target, torch.tensor([1, 0]), box)
    assert images[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert labels.tolist() == [[0.75, 0.25], [0.0, 1.0]]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.05, 4), st.floats(0, 1), st.sampled_from([Mixup, CutMix]))
def test_targets_are_probabilities_that_match_the_images(
    seed: int, alpha: float, probability: float, kind: type[Mixup] | type[CutMix]
) -> None:
    x, y = coloured(8)
    before = x.clone()
    found = kind(alpha, probability).transform_batch(Batch(x, y, y, 8), step_of(nn.Identity(), seed))
    assert torch.equal(x, before), "the batch was changed in place"
    assert found.target is not None
    torch.testing.assert_close(found.target.sum(1), torch.ones(8))
    # Each image is as gray as its target says, whatever was mixed.
    torch.testing.assert_close(found.x.mean((1, 2, 3)), found.target @ (torch.arange(8) / 8))
    assert torch.equal(found.y, y)


def test_the_probability_is_the_share_that_is_mixed() -> None:
    x, y = coloured(1000)
    batch = Batch(x, y, y, 1000)
    found = Mixup(1.0, 0.25).transform_batch(batch, step_of(nn.Identity()))
    share = (found.x != x).flatten(1).any(1).float().mean()
    assert abs(float(share) - 0.25) < 0.05


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_beta(alpha: float) -> None:
    shares = beta_shares(torch.zeros(20_000, 1, 1, 1), alpha, seeded(0))
    assert abs(float(shares.mean()) - 0.5) < 0.01
    assert abs(float(shares.var()) - 1 / (4 * (2 * alpha + 1))) < 0.005


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_partners_are_a_permutation(seed: int) -> None:
    assert partners(torch.zeros(9, 1, 1, 1), seeded(seed)).sort().values.tolist() == list(range(9))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_boxes_are_rectangles_no_larger_than_asked(seed: int, share: float) -> None:
    box = random_boxes(torch.zeros(16, 1, 10, 6), torch.full((16,), share), seeded(seed))
    rows, columns = box.any(2), box.any(1)
    assert torch.equal(box, rows[:, :, None] & columns[:, None, :])
    assert (box.flatten(1).float().mean(1) <= 1 - share + 1e-6).all()
    if share == 0:
        assert (rows.sum(1) <= 10).all()


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("adversarial", ["pgd_training", "n_fgsm", "trades"])
def test_soft_targets_reach_every_adversarial_training(mixing: str, adversarial: str) -> None:
    """The loss of mixed images is another one where their labels are not mixed with them."""

    def made(name: str, **parameters: float) -> Defense:
        defense = registry.create(registry.find("defense", name), parameters)
        assert isinstance(defense, Defense)
        return defense

    x, y = coloured(4)
    losses = []
    for hard in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        batch = Batch(x, y, y, 4)
        mixed = made(mixing, alpha=1.0, probability=1.0).transform_batch(batch, step_of(model))
        if hard:
            mixed.target = None
        hooked = [(made(adversarial), step_of(model))]
        losses.append(train_step(model, mixed, hooked, torch.optim.SGD(model.parameters(), lr=0.1), precision=None)[0])
    assert not torch.equal(losses[0], losses[1])
