"""Sampling defenses find what was planted in real data, and leave the rest."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustkit.data.split import Split, split_of
from robustkit.defenses.deduplicate import Deduplicate
from robustkit.defenses.duplicates import exact_matches, find_duplicates, near_matches, signatures
from robustkit.defenses.neighbours import inconsistent, nearest, spare_emptied_classes, votes
from robustkit.defenses.sampling import BalancedSampling, KnnFilter, inverse_frequency, pixel_features
from robustkit.errors import UsageError
from robustkit.train.hooks import DataContext

Context = Callable[..., DataContext]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fashion(root: Path, count: int) -> Split:
    def read(stem: str, header: int) -> np.ndarray:
        path = next(path for path in sorted(root.iterdir()) if path.name.startswith(stem))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return np.frombuffer(raw, np.uint8, offset=header)

    images = read("train-images", 16).reshape(-1, 1, 28, 28)[:count]
    return split_of(torch.from_numpy(images.copy()), torch.from_numpy(read("train-labels", 8)[:count].copy()))


def appended(data: Split, images: Tensor, labels: Tensor) -> Split:
    return split_of(torch.cat([data.images, images]), torch.cat([data.labels, labels]))


def disturbed(images: Tensor) -> Tensor:
    """Darker, with noise of 2/255: what a re-encoded copy of an image looks like."""
    noise = torch.empty(images.shape).normal_(0, 2, generator=generator(4))
    return (images.float() * 0.9 + 8 + noise).round().clamp(0, 255).to(torch.uint8)


# balanced_sampling


def test_inverse_frequency_gives_every_class_the_same_weight() -> None:
    labels = torch.tensor([0] * 90 + [1] * 9 + [3] * 1)
    weights = inverse_frequency(labels)
    totals = torch.zeros(4, dtype=weights.dtype).index_add_(0, labels, weights)
    torch.testing.assert_close(totals[[0, 1, 3]], torch.full((3,), 100 / 3, dtype=weights.dtype))
    torch.testing.assert_close(inverse_frequency(labels, 0.0), torch.ones(100, dtype=weights.dtype))
    half = inverse_frequency(labels, 0.5)
    assert half[99] / half[0] == pytest.approx(90**0.5)


def test_balanced_sampling_draws_classes_uniformly(context: Context) -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    weights = BalancedSampling().sample_weights(labels, context())
    drawn = labels[torch.multinomial(weights, 30000, replacement=True, generator=generator())]
    counts = torch.bincount(drawn)
    # Standard deviation of each count is 82.
    assert (counts - 10000).abs().max() < 400


# deduplicate


def test_exact_matches_name_the_first_of_a_group() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=generator())
    images[3] = images[1]
    images[5] = images[1]
    images[4] = images[0]
    images[4, 2, 3, 3] ^= 1
    assert exact_matches(images).tolist() == [-1, -1, -1, 1, -1, 1]
    assert exact_matches(images[[2, 5]], images).tolist() == [2, 1]
    assert exact_matches(images[:0]).tolist() == []
    assert exact_matches(images[:2], images[:0]).tolist() == [-1, -1]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 40))
def test_exact_matches_agree_with_comparing_bytes(seed: int, count: int) -> None:
    # Few possible images, so that many coincide.
    images = torch.randint(0, 2, (count, 1, 2, 2), dtype=torch.uint8, generator=generator(seed))
    seen: dict[bytes, int] = {}
    expected = []
    for position, image in enumerate(images.numpy()):
        expected.append(seen.get(image.tobytes(), -1))
        seen.setdefault(image.tobytes(), position)
    assert exact_matches(images).tolist() == expected


def test_equal_hashes_of_different_images_are_not_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(3 * 4, dtype=torch.uint8).view(3, 1, 2, 2)
    monkeypatch.setattr(
        "robustkit.defenses.duplicates.hashes", lambda found: torch.zeros(len(found), dtype=torch.int64)
    )
    assert exact_matches(images).tolist() == [-1, -1, -1]


def test_flat_images_resemble_nothing() -> None:
    flat = torch.full((3, 1, 8, 8), 7, dtype=torch.uint8)
    flat[1] += 1
    found = find_duplicates(flat, similarity=0.5)
    assert found.of.tolist() == [-1, -1, 0]
    assert found.exact.tolist() == [False, False, True]


def test_near_matches_across_blocks(monkeypatch: pytest.MonkeyPatch, digits: Split) -> None:
    vectors = signatures(digits.images[:200], side=16)
    whole = near_matches(vectors, 0.95)
    monkeypatch.setattr("robustkit.defenses.duplicates._BLOCK", 7)
    assert torch.equal(whole, near_matches(vectors, 0.95))
    cosine = (vectors @ vectors.T).tril(-1)
    assert torch.equal(whole >= 0, (cosine >= 0.95).any(1))


def check_planted(data: Split, context: Context, log: Callable[[str], dict[str, object]], most: int) -> None:
    """Plant 20 exact and 20 disturbed copies and two leaks; at most `most` other images may go."""
    chosen = torch.randperm(len(data), generator=generator(2))[:40]
    copies = torch.cat([data.images[chosen[:20]], disturbed(data.images[chosen[20:]])])
    labels = data.labels[chosen].clone()
    labels[0] = (labels[0] + 1) % 10
    planted = appended(data, copies, labels)
    test = split_of(
        torch.stack([data.images[3], disturbed(data.images[5:6])[0], 255 - data.images[9]]), data.labels[:3]
    )
    kept = Deduplicate().prepare_data(planted, context(test))
    removed = log("training images repeat")
    ids = set(removed["ids"])  # type: ignore[call-overload]
    assert set(range(len(data), len(data) + 40)) <= ids
    assert removed["exact"] == 20
    assert 20 <= removed["near"] <= 20 + most  # type: ignore[operator]
    assert removed["different_label"] == 1
    assert removed["removed"] == len(ids) == len(planted) - len(kept)
    assert set(kept.index.tolist()) == set(range(len(planted))) - ids
    leaks = log("test images")
    assert leaks["leaks"] == 2
    assert leaks["exact"] == 1
    assert leaks["test_ids"] == [0, 1]
    assert leaks["ids"] == [3, 5]


def test_deduplicate_finds_planted_copies_among_digits(digits: Split, context: Context, log: object) -> None:
    check_planted(digits, context, log.about, most=1)  # type: ignore[attr-defined]


def test_deduplicate_finds_planted_copies_in_fashion_mnist(
    fashion_mnist_root: Path, context: Context, log: object
) -> None:
    check_planted(fashion(fashion_mnist_root, 3000), context, log.about, most=3)  # type: ignore[attr-defined]


def test_deduplicate_without_near_removes_byte_identical_images_alone(digits: Split, context: Context) -> None:
    planted = appended(digits, torch.cat([digits.images[:2], disturbed(digits.images[2:4])]), digits.labels[:4])
    kept = Deduplicate(near=False).prepare_data(planted, context())
    assert kept.index.tolist() == [*range(1797), 1799, 1800]


def test_different_objects_of_one_outline_are_not_duplicates(fashion_mnist_root: Path) -> None:
    data = fashion(fashion_mnist_root, 3000)
    coarse = near_matches(signatures(data.images, side=16), 0.99) >= 0
    confirmed = find_duplicates(data.images, similarity=0.99).repeated
    assert (confirmed <= coarse).all()
    assert confirmed.sum() < 0.2 * coarse.sum()


# knn_filter


def test_nearest_is_brute_force_without_self(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(50, 8, generator=generator())
    monkeypatch.setattr("robustkit.defenses.neighbours._BLOCK", 16)
    unit = features / features.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(-2)
    assert torch.equal(nearest(features, 5), cosine.topk(5).indices)


def test_votes_and_inconsistency() -> None:
    labels = torch.tensor([0, 1, 1, 0, 2])
    counts = votes(labels, torch.tensor([[1, 2, 3], [2, 3, 4], [0, 3, 1], [0, 1, 2], [0, 3, 1]]), 3)
    assert counts.tolist() == [[1, 2, 0], [1, 1, 1], [2, 1, 0], [1, 2, 0], [2, 1, 0]]
    # The second has a tie with its own label, which it keeps.
    assert inconsistent(labels, counts, 0.5).tolist() == [True, False, True, True, True]
    assert inconsistent(labels, counts, 0.7).tolist() == [False] * 5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_no_class_is_ever_emptied(rows: list[tuple[int, bool]]) -> None:
    labels = torch.tensor([label for label, _ in rows])
    asked = torch.tensor([gone for _, gone in rows])
    removed, spared = spare_emptied_classes(labels, asked, 5)
    assert set(labels[~removed].tolist()) == set(labels.tolist())
    assert (removed <= asked).all()
    assert all(asked[labels == spare].all() for spare in spared)
    untouched = ~torch.isin(labels, spared)
    assert torch.equal(removed[untouched], asked[untouched])


def flipped(data: Split, share: float) -> tuple[Split, Tensor]:
    flip = torch.rand(len(data), generator=generator(1)) < share
    moved = (data.labels + torch.randint(1, 10, (len(data),), generator=generator(2))) % 10
    return split_of(data.images, torch.where(flip, moved, data.labels)), flip


@pytest.mark.parametrize("features", ["pixels", "probe"])
def test_knn_filter_removes_planted_label_flips(digits: Split, context: Context, log: object, features: str) -> None:
    data, flip = flipped(digits, 0.1)
    kept = KnnFilter(features=features).prepare_data(data, context(features=pixel_features))  # type: ignore[arg-type]
    gone = torch.ones(len(data), dtype=torch.bool)
    gone[kept.index] = False
    # Measured: precision 0.95, recall 0.95.
    assert (gone & flip).sum() / gone.sum() > 0.92
    assert (gone & flip).sum() / flip.sum() > 0.92
    numbers = log.about("knn_filter")  # type: ignore[attr-defined]
    assert numbers["removed"] == int(gone.sum())
    assert numbers["ids"] == gone.nonzero().squeeze(1).tolist()


def test_knn_filter_uses_the_probe(digits: Split, context: Context) -> None:
    data, _ = flipped(digits, 0.1)
    asked: list[Split] = []

    def probe(split: Split) -> Tensor:
        asked.append(split)
        # Features that repeat the given label: nothing contradicts it.
        return torch.nn.functional.one_hot(split.labels, 10).float()

    assert len(KnnFilter().prepare_data(data, context(features=probe))) == len(data)
    assert asked == [data]


def test_knn_filter_spares_a_rare_class(digits: Split, context: Context, log: object) -> None:
    rare = digits.labels.clone()
    rare[:2] = 10
    kept = KnnFilter(features="pixels").prepare_data(split_of(digits.images, rare), context())
    assert (kept.labels == 10).sum() == 2
    assert log.about("knn_filter")["spared_classes"] == [10]  # type: ignore[attr-defined]


def test_knn_filter_needs_more_images_than_neighbours(digits: Split, context: Context) -> None:
    with pytest.raises(UsageError, match="only 10 training images"):
        KnnFilter(k=10).prepare_data(digits.select(torch.arange(10)), context())
