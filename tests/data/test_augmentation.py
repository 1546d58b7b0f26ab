"""Noise and RandAugment: size, range, seeds, and that labels' images stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustkit import registry
from robustkit.data.augment import Crop, GaussianNoise, gaussian_noise
from robustkit.data.rand_augment import RandAugment, rand_augment
from robustkit.errors import UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(channels: int = 3) -> Tensor:
    return torch.rand(20, channels, 16, 16, generator=seeded(1))


def test_noise_has_the_deviation_asked_and_is_clipped_where_asked() -> None:
    gray = torch.full((50, 1, 20, 20), 0.5)
    noise = gaussian_noise(gray, 0.1, seeded(), clip=False) - gray
    assert abs(float(noise.std()) - 0.1) < 0.002
    assert abs(float(noise.mean())) < 0.002
    loud = GaussianNoise(1.0)(gray, seeded())
    assert (loud.min(), loud.max()) == (0, 1)
    assert GaussianNoise(1.0, clip=False)(gray, seeded()).max() > 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_rand_augment_keeps_shape_kind_and_range(channels: int, kind: torch.dtype) -> None:
    x = images(channels) if kind == torch.float32 else (images(channels) * 255).to(torch.uint8)
    before = x.clone()
    found = rand_augment(x, 2, 15, 8, seeded())
    assert torch.equal(x, before)
    assert (found.shape, found.dtype) == (x.shape, kind)
    if kind == torch.float32:
        assert found.min() >= 0
        assert found.max() <= 1


def test_a_crop_cannot_reflect_more_than_there_is() -> None:
    side = images().shape[-1]
    with pytest.raises(UsageError, match=rf"padding is {side}; {side - 1} pixels at most"):
        Crop(side)(images(), seeded())
    assert Crop(side - 1)(images(), seeded()).shape == Crop(side, mode="constant")(images(), seeded()).shape


def test_rand_augment_is_drawn_by_the_generator_alone() -> None:
    x = images()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = RandAugment()(x, seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(RandAugment()(x, seeded(3)), first)
    assert not torch.equal(RandAugment()(x, seeded(4)), first)


def test_groups_have_operations_of_their_own() -> None:
    x = images()[:1].repeat(40, 1, 1, 1)
    assert len(rand_augment(x, 2, 9, 1, seeded()).flatten(1).unique(dim=0)) == 1
    assert len(rand_augment(x, 2, 9, 10, seeded()).flatten(1).unique(dim=0)) > 5


def test_a_magnitude_beyond_the_scale_is_found_when_the_recipe_is_checked() -> None:
    _, problems = registry.check_parameters(registry.find("augmentation", "rand_augment"), {"magnitude": 31})
    assert "30" in problems[0][1]
