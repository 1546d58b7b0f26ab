"""Batches: every example once, resident and streamed alike, augmented on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustkit.data.arrays import limited, stratified
from robustkit.data.augment import Crop, Cutout, Flip, cutout, random_crop, random_flip
from robustkit.data.batches import epoch_order, training_batches
from robustkit.data.split import Split, split_of

CPU = torch.device("cpu")


def split(count: int = 50) -> Split:
    torch.manual_seed(0)
    return split_of(torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8), torch.arange(count) % 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(data: Split, size: int, **given: int | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    order = epoch_order(len(data), generator())
    return list(training_batches(data, order, size, CPU, [Crop(2), Flip(), Cutout(3)], generator(1), **given))


def test_an_epoch_has_every_example_once() -> None:
    data = split()
    found = torch.cat([index for _, _, index in batches(data, 16)])
    assert sorted(found.tolist()) == list(range(50))
    for x, y, index in training_batches(data, torch.arange(50), 16, CPU, [], generator()):
        assert x.dtype == torch.float32
        assert torch.equal(x, data.images[index].float() / 255)
        assert torch.equal(y, data.labels[index])


@pytest.mark.parametrize("size", [7, 16, 50, 64])
def test_streamed_batches_are_the_resident_ones_bit_for_bit(size: int) -> None:
    data = split()
    resident, streamed = batches(data, size), batches(data, size, memory_limit=1)
    assert len(resident) == len(streamed)
    for one, other in zip(resident, streamed, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_a_last_batch_of_one_is_left_out() -> None:
    assert [len(y) for _, y, _ in batches(split(33), 16)] == [16, 16]
    assert [len(y) for _, y, _ in batches(split(1), 16)] == [1]


def test_weights_draw_with_replacement() -> None:
    order = epoch_order(1000, generator(), torch.tensor([0.0, 1.0, 3.0, 0.0]).repeat(250))
    counts = torch.bincount(order % 4, minlength=4)
    assert counts[0] == counts[3] == 0
    assert counts[2] / counts[1] == pytest.approx(3, rel=0.2)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.rand(40, 2, 6, 6)
    found = random_crop(images, 2, "constant", generator())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = set()
    for number in range(40):
        windows = {
            (top, left): padded[number, :, top : top + 6, left : left + 6] for top in range(5) for left in range(5)
        }
        matching = [place for place, window in windows.items() if torch.equal(window, found[number])]
        assert matching
        places.update(matching)
    assert len(places) > 10, "every shift may happen"


def test_a_flip_mirrors_about_half_and_leaves_the_rest() -> None:
    images = torch.rand(400, 1, 4, 4)
    found = random_flip(images, generator())
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~mirrored], images[~mirrored])
    assert 150 < int(mirrored.sum()) < 250


def test_a_cutout_is_one_square_of_zeros_within_the_image() -> None:
    images = torch.ones(200, 3, 9, 9)
    found = cutout(images, 4, generator())
    holes = (found == 0).all(1)
    assert torch.equal((found == 0).any(1), holes)
    assert int(holes.flatten(1).sum(1).max()) == 16
    assert int(holes.flatten(1).sum(1).min()) >= 4, "a hole at the corner is cut off"


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 9), height=st.integers(5, 12), width=st.integers(5, 12), channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_augmentations_keep_shape_range_and_repeat(
    count: int, height: int, width: int, channels: int, seed: int
) -> None:
    images = torch.rand(count, channels, height, width, generator=generator(seed))
    for one in (Crop(3), Crop(4, "constant"), Flip(), Cutout(5)):
        found = one(images, generator(seed))
        assert found.shape == images.shape
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        assert torch.equal(found, one(images, generator(seed)))


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=6), share=st.floats(0.05, 0.6), limit=st.integers(2, 200)
)
def test_splits_and_limits_keep_the_classes_in_proportion(counts: list[int], share: float, limit: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, cut = stratified(labels, share, 0)
    assert sorted([*kept, *cut]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[cut] == label).sum())
        assert 1 <= taken < count
        assert abs(taken - share * count) <= 1
    chosen = limited(labels, limit, 0)
    assert len(chosen) == min(limit, len(labels))
    assert len(set(chosen.tolist())) == len(chosen)
    for label, count in enumerate(counts):
        assert abs(int((labels[chosen] == label).sum()) - count * len(chosen) / len(labels)) <= 1
