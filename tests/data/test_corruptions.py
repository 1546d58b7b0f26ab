"""Common corruptions: graded, in the box, repeatable, the same whatever the batch and the device."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustkit.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robustkit.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles

RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog", "snow", "elastic"}


def pictures(kind: str) -> Tensor:
    """Real digits of 8, 12 and 28 pixels, and colour pictures made of them."""
    digits = oracles.digits()[0][:64]
    if kind == "colour":
        large = torch.nn.functional.interpolate(digits, size=(32, 24), mode="bilinear")
        return torch.cat([large, large.flip(3), 0.5 * large + 0.2], dim=1)
    side = int(kind)
    return torch.nn.functional.interpolate(digits, size=(side, side), mode="bilinear") if side != 8 else digits


def changed(x: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    return corrupt(x, name, severity, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["8", "12", "28", "colour"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_is_further_from_the_clean_image(name: str, kind: str) -> None:
    x = pictures(kind)
    before = x.clone()
    found = [changed(x, name, severity) for severity in SEVERITIES]
    far = [float((one - x).flatten(1).norm(dim=1).mean()) for one in found]
    assert far[0] > 0
    assert all(one < other for one, other in itertools.pairwise(far)), far
    assert torch.equal(x, before)
    for one in found:
        assert one.shape == x.shape
        assert one.dtype == x.dtype
        assert one.min() >= 0
        assert one.max() <= 1
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(name: str) -> None:
    x = pictures("12")
    assert torch.equal(changed(x, name, 3), changed(x, name, 3))
    assert torch.equal(changed(x, name, 3), changed(x, name, 3, seed=1)) == (name not in RANDOM)
    state = torch.get_rng_state()
    changed(x, name, 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - RANDOM))
def test_what_is_not_random_does_to_an_image_what_it_does_to_it_alone(name: str) -> None:
    x = pictures("colour")[:5]
    together = changed(x, name, 4)
    for place in range(5):
        assert torch.allclose(together[place], changed(x[place : place + 1], name, 4)[0], atol=1e-6)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_plain_images_are_no_special_case(name: str, value: float) -> None:
    for severity in (1, 5):
        found = changed(torch.full((2, 3, 8, 8), value), name, severity)
        assert torch.isfinite(found).all()
        assert found.min() >= 0
        assert found.max() <= 1
        if name in ("gaussian_blur", "defocus_blur", "motion_blur", "contrast", "elastic", "pixelate"):
            assert torch.allclose(found, torch.full_like(found, value), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_device_gives_the_same_images(name: str) -> None:
    x = pictures("colour")
    there = changed(x.cuda(), name, 3)
    assert there.is_cuda
    # JPEG rounds to 8 bits, so that the last bit of a float may move a whole level.
    assert torch.allclose(there.cpu(), changed(x, name, 3), atol=1e-4)


@pytest.mark.parametrize("kind", ["8", "28"])
def test_jpeg_in_strips_is_jpeg_image_by_image(kind: str) -> None:
    x = pictures(kind)[:6]
    for severity, quality in zip(SEVERITIES, (75, 55, 40, 28, 18), strict=True):
        found = changed(x, "jpeg", severity)
        for one, image in zip(found, x, strict=True):
            file = io.BytesIO()
            Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(file, "JPEG", quality=quality)
            alone = torch.from_numpy(np.array(Image.open(file)))
            assert torch.equal((one[0] * 255).round().to(torch.uint8), alone)


def test_jpeg_takes_more_images_than_one_strip_holds_and_other_channels() -> None:
    x = torch.rand(3000, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = changed(x, "jpeg", 1)
    assert torch.equal(found[2999:], changed(x[2999:], "jpeg", 1))


def test_noise_is_as_strong_as_it_says() -> None:
    x = torch.full((50, 1, 32, 32), 0.5)
    assert float((changed(x, "gaussian_noise", 3) - x).std()) == pytest.approx(0.08, rel=0.02)
    assert float((changed(x, "shot_noise", 3) - x).std()) == pytest.approx((0.5 / 100) ** 0.5, rel=0.02)
    hit = changed(x, "impulse_noise", 5) != x
    assert float(hit.double().mean()) == pytest.approx(0.07, rel=0.05)


@pytest.mark.parametrize(
    ("x", "name", "severity", "message"),
    [
        (torch.rand(1, 1, 8, 8), "gausian_noise", 1, "unknown corruption"),
        (torch.rand(1, 1, 8, 8), "fog", 0, "severity"),
        (torch.rand(1, 1, 8, 8), "fog", 6, "severity"),
        (torch.rand(1, 8, 8), "fog", 1, "N, C, H, W"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "fog", 1, "float images"),
        (torch.rand(1, 1, 3, 8), "fog", 1, "4 pixels"),
    ],
)
def test_mistakes(x: Tensor, name: str, severity: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        changed(x, name, severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_images_can_be_corrupted(name: str) -> None:
    for shape in ((2, 1, 4, 4), (2, 3, 4, 9)):
        for severity in SEVERITIES:
            assert changed(torch.rand(shape), name, severity).shape == shape
