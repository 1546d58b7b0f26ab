"""The alternating flip: both sides of every image in two epochs, whatever the batches are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustkit.data.augment import Flip, alternating_flip, random_flip
from robustkit.data.batches import epoch_order, training_batches
from robustkit.data.split import Split, split_of

CPU = torch.device("cpu")
COUNT = 400


@pytest.fixture
def data() -> Split:
    images = torch.zeros(COUNT, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    return split_of(images, torch.zeros(COUNT, dtype=torch.int64))


def mirrored(data: Split, epoch: int, *, size: int = 64, limit: int | None = None, seed: int = 5) -> Tensor:
    """Which images an epoch shows mirrored (COUNT,), by their positions."""
    generator = torch.Generator().manual_seed(epoch)
    found = torch.zeros(COUNT, dtype=torch.bool)
    order = epoch_order(COUNT, generator)
    augment = [Flip(alternate=True)]
    for x, _, positions in training_batches(
        data, order, size, CPU, augment, generator, memory_limit=limit, epoch=epoch, seed=seed
    ):
        found[positions] = x[:, 0, 0, 3] == 1
        assert torch.equal(x[:, 0, 0, 0] == 0, x[:, 0, 0, 3] == 1)
    return found


def test_every_image_is_mirrored_in_every_other_epoch(data: Split) -> None:
    epochs = [mirrored(data, epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert 0.4 < float(epochs[0].float().mean()) < 0.6


def test_neither_batches_nor_streaming_change_whose_turn_it_is(data: Split) -> None:
    assert torch.equal(mirrored(data, 0), mirrored(data, 0, size=9, limit=1))
    assert not torch.equal(mirrored(data, 0), mirrored(data, 0, seed=6))


def test_whose_turn_it_is_depends_on_no_neighbour() -> None:
    images = torch.arange(2.0).repeat(20_000, 1, 1, 1)
    first = alternating_flip(images, torch.arange(20_000), 0, 2**62 + 1)[:, 0, 0, 0]
    for shift in (1, 2, 3, 64, 128):
        equal = float((first[shift:] == first[:-shift]).float().mean())
        assert abs(equal - 0.5) < 0.015, shift  # four standard deviations


def test_without_alternate_the_flip_is_the_random_one(data: Split) -> None:
    x = torch.rand(8, 3, 4, 4)
    wanted = random_flip(x, torch.Generator().manual_seed(1))
    assert torch.equal(Flip()(x, torch.Generator().manual_seed(1)), wanted)
    split = split_of((x * 255).to(torch.uint8), torch.zeros(8, dtype=torch.int64))
    given = training_batches(split, torch.arange(8), 8, CPU, [Flip()], torch.Generator().manual_seed(1), epoch=3)
    floats = split.images.float() / 255
    assert torch.equal(next(iter(given))[0], random_flip(floats, torch.Generator().manual_seed(1)))
