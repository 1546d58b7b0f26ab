"""Filters and samplers against closed forms, brute force and what was planted in real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.data.poison.backdoor import BadNets
from robustkit.data.split import Split, split_of
from robustkit.defenses.clustering import ActivationClustering, silhouette, two_means, whitened
from robustkit.defenses.deduplicate import Deduplicate
from robustkit.defenses.losses import HardExamples, TrimmedLoss, highest, lowest
from robustkit.defenses.sampling import Subsample, inverse_frequency, random_part
from robustkit.defenses.spectral import SpectralSignatures, highest_of_each_class, outlier_scores
from robustkit.train.hooks import Batch, DataContext, Forward, Step
from robustkit.train.prepare import filtered
from robustkit.train.step import total_loss

Context = Callable[..., DataContext]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# spectral_signatures


def test_outlier_scores_are_those_of_the_singular_value_decomposition() -> None:
    features = normal(40, 6) * torch.arange(1, 7)
    centred = features.double() - features.double().mean(0)
    _, _, vectors = torch.linalg.svd(centred)
    torch.testing.assert_close(outlier_scores(features), (centred @ vectors[0]).square())


def test_a_common_offset_does_not_count() -> None:
    features = normal(40, 6)
    torch.testing.assert_close(outlier_scores(features), outlier_scores(features + 5.0), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_highest_of_each_class(rows: list[tuple[int, float]], share: float) -> None:
    labels, scores = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    found = highest_of_each_class(scores, labels, share)
    for label in set(labels.tolist()):
        members = labels == label
        assert int(found[members].sum()) == int(share * int(members.sum()))
        if found[members].any() and not found[members].all():
            assert scores[members & found].min() >= scores[members & ~found].max()


def planted_features(data: Split, seed: int = 0) -> tuple[Split, Tensor, Tensor]:
    """Digits with a backdoor, features in which the class shows, and the poison as one more direction."""
    planted = BadNets(target=3, rate=0.02).plant(data.images, data.labels, 10)
    poisoned = split_of(planted.images, planted.labels)
    features = normal(len(data), 4, seed=seed)
    features[:, 0] += 4 * planted.labels
    features[:, 3] += 8.0 * planted.mask
    return poisoned, planted.mask, features


def test_spectral_signatures_find_what_is_planted(digits: Split, context: Context) -> None:
    data, mask, features = planted_features(digits)
    kept = SpectralSignatures(share=0.15).prepare_data(data, context(features=lambda _: features))
    found = filtered("spectral_signatures", data, kept, mask)
    assert found.recall == 1.0
    # 15 % and half of it again, of each class.
    assert found.removed == sum(int(0.225 * int(count)) for count in torch.bincount(data.labels))


def test_a_class_is_never_emptied(digits: Split, context: Context) -> None:
    kept = SpectralSignatures(share=0.9, margin=3.0).prepare_data(digits, context())
    assert set(kept.labels.tolist()) == set(range(10))


# activation_clustering


def test_whitened_features_are_uncorrelated_with_variance_1() -> None:
    mixed = normal(200, 5) @ normal(5, 5, seed=1)
    points = whitened(torch.cat([mixed, mixed[:, :2]], 1), 10)
    assert points.shape == (200, 5), "directions in which nothing varies are left out"
    torch.testing.assert_close(points.T.cov(), torch.eye(5, dtype=torch.float64))
    assert whitened(mixed, 2).shape == (200, 2)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_two_means_are_the_best_split_there_is(seed: int) -> None:
    # Two clouds a few deviations apart, so that the best split is one that Lloyd's steps do not move away from.
    points = normal(9, 2, seed=seed).double()
    points[:4] += 4
    found = two_means(points, generator(seed))

    def cost(assigned: Tensor) -> float:
        parts = [points[assigned == which] for which in (False, True)]
        return float(sum((part - part.mean(0)).square().sum() for part in parts if len(part)))

    every = (torch.tensor(bits) for bits in itertools.product([False, True], repeat=9))
    assert cost(found) == pytest.approx(min(map(cost, every)))


def test_equal_points_are_one_cluster() -> None:
    assert not two_means(torch.ones(5, 3), generator()).any()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_the_silhouette_is_that_of_scikit_learn(seed: int) -> None:
    points, assigned = normal(30, 3, seed=seed), torch.rand(30, generator=generator(seed)) < 0.4
    if 2 <= int(assigned.sum()) <= 28:
        expected = silhouette_score(points.numpy(), assigned.numpy())
        assert silhouette(points, assigned, generator()) == pytest.approx(expected, abs=1e-5)
    assert silhouette(points, torch.zeros(30, dtype=torch.bool), generator()) == 0.0


def test_activation_clustering_finds_what_is_planted(digits: Split, context: Context, log: object) -> None:
    data, mask, features = planted_features(digits)
    kept = ActivationClustering().prepare_data(data, context(features=lambda _: features))
    assert 3 in log.about("activation")["classes"]  # type: ignore[attr-defined]
    assert filtered("activation_clustering", data, kept, mask).recall == 1.0
    target = data.select(data.labels == 3)
    assert filtered("activation_clustering", target, kept, mask).precision == 1.0
    # A cluster that holds more than `smaller` of its class is no poison, nor are two that touch.
    for strict in (ActivationClustering(smaller=0.01), ActivationClustering(apart=0.9)):
        assert len(strict.prepare_data(data, context(features=lambda _: features))) == len(data)


def test_small_classes_are_left_alone(digits: Split, context: Context) -> None:
    few = digits.select(torch.arange(40))
    assert len(ActivationClustering().prepare_data(few, context())) == 40


# subsample, balanced_sampling, deduplicate


@pytest.mark.parametrize("per_class", [False, True])
def test_a_random_part_has_its_size(per_class: bool) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2])
    kept = random_part(labels, 0.2, generator(), per_class=per_class)
    assert int(kept.sum()) == (12 + 6 + 1 if per_class else 18)
    if per_class:
        assert torch.bincount(labels[kept]).tolist() == [12, 6, 1]
    assert torch.equal(kept, random_part(labels, 0.2, generator(), per_class=per_class))
    assert not torch.equal(kept, random_part(labels, 0.2, generator(1), per_class=per_class))


def test_subsample_keeps_the_order(digits: Split, context: Context) -> None:
    kept = Subsample(share=0.3).prepare_data(digits, context())
    assert len(kept) == round(0.3 * len(digits))
    assert (kept.index.diff() > 0).all()


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), beta=st.floats(0.001, 0.9999))
def test_effective_numbers(counts: list[int], beta: float) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    raw = torch.tensor([(1 - beta) / (1 - beta ** counts[label]) for label in labels.tolist()], dtype=torch.float64)
    torch.testing.assert_close(inverse_frequency(labels, beta=beta), raw / raw.mean())
    torch.testing.assert_close(inverse_frequency(labels, beta=0.0), torch.ones(len(labels), dtype=torch.float64))


def test_duplicates_by_features_are_removed_and_leaks_told(digits: Split, context: Context, log: object) -> None:
    test = digits.select(torch.tensor([5, 6]))
    train = digits.select(torch.arange(4))
    # Directions around the mean: the third example points where the first does, and so does the first test image.
    known = torch.tensor([[3.0, 0.0], [0.0, 3.0], [6.0, 0.0], [-9.0, -3.0]])
    shown = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    found = Deduplicate(near=False, embedding=0.999).prepare_data(
        train, context(test, features=lambda split: known if len(split) == 4 else shown)
    )
    assert found.index.tolist() == [0, 1, 3]
    assert log.about("training images repeat")["near"] == 1  # type: ignore[attr-defined]
    assert log.about("test images")["test_ids"] == [5]  # type: ignore[attr-defined]


# hard_examples, trimmed_loss


@settings(deadline=None, max_examples=60)
@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=20), share=st.floats(0.01, 0.99))
def test_the_highest_losses_are_kept_or_dropped(losses: list[float], share: float) -> None:
    values = torch.tensor(losses)
    kept, dropped = highest(values, share) > 0, lowest(values, share) == 0
    assert int(kept.sum()) == max(1, int(np.ceil(share * len(losses) - 1e-9)))
    assert int(dropped.sum()) == min(len(losses) - 1, int(share * len(losses) + 1e-9))
    for chosen in (kept, dropped):
        if chosen.any() and not chosen.all():
            assert values[chosen].min() >= values[~chosen].max()


@pytest.mark.parametrize(
    ("defense", "which"),
    [(HardExamples(keep=0.25, warmup=0.5), slice(6, 8)), (TrimmedLoss(drop=0.25, warmup=0.5), slice(0, 6))],
)
def test_the_loss_is_the_mean_over_what_counts(defense: HardExamples | TrimmedLoss, which: slice) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batch = Batch(torch.rand(8, 1, 2, 2, generator=generator()), torch.arange(8) % 3, torch.arange(8), 3)
    with torch.no_grad():
        order = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none").argsort()

    def gradient(progress: float) -> tuple[Tensor, Tensor]:
        step = Step(model, 0, 1, progress, Threat("linf", 0.1), generator())
        loss = total_loss(batch, Forward(model, batch), [(defense, step)])
        return loss, torch.autograd.grad(loss, model[1].weight)[0]  # type: ignore[arg-type]

    for progress, rows in ((0.5, order[which]), (0.4, order)):
        loss, found = gradient(progress)
        expected = nn.functional.cross_entropy(model(batch.x[rows]), batch.y[rows])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, torch.autograd.grad(expected, model[1].weight)[0])  # type: ignore[arg-type]
