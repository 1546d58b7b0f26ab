"""Common corruptions of images: noise, blur, weather and digital, each at five severities.

After Hendrycks & Dietterich 2019 (arXiv 1903.12261, section 3). Strengths are made for small images, 8 to 64 pixels a
side; lengths grow with the side from 32 pixels on. Images are float (N, C, H, W) in [0, 1] and stay so. Random numbers
are drawn where the generator is, so that a CPU generator gives the same images on every device.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur as blurred

from robustkit.errors import UsageError

SEVERITIES = (1, 2, 3, 4, 5)
USUAL_SIDE = 32
Corruption = Callable[[Tensor, int, torch.Generator], Tensor]


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Normal noise on every value, as in low light."""
    deviation = (0.04, 0.06, 0.08, 0.10, 0.12)[severity - 1]
    return (images + deviation * _normal(images.shape, images, generator)).clamp(0, 1)


def shot_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Poisson noise: light comes in `photons` at full brightness."""
    photons = (400.0, 200.0, 100.0, 60.0, 40.0)[severity - 1]
    counts = torch.poisson((images * photons).to(generator.device, torch.float32), generator=generator)
    return (counts.to(images.device, images.dtype) / photons).clamp(0, 1)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A share of the values is black or white, as from bit errors."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draw = _uniform(images.shape, images, generator)
    # One draw decides both: the lower half of what is hit is black, the upper half white.
    return torch.where(draw < share, (draw >= share / 2).to(images.dtype), images)


def gaussian_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blur by a normal kernel; `generator` is not used."""
    return _smooth(images, (0.4, 0.6, 0.8, 1.0, 1.3)[severity - 1] * _scale(images)).clamp(0, 1)


def defocus_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blur by a disk with a soft edge, as out of focus; `generator` is not used."""
    radius = (0.6, 0.75, 0.9, 1.2, 1.6)[severity - 1] * _scale(images)
    reach = min(math.ceil(radius + 0.5), min(images.shape[2:]) - 1)
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = (radius + 0.5 - (steps[:, None].square() + steps[None].square()).sqrt()).clamp(0, 1)
    channels = images.shape[1]
    weight = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="reflect")
    return functional.conv2d(padded, weight, groups=channels).clamp(0, 1)


def motion_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blur along a direction of each image's own, up to 45 degrees from level."""
    length = (1.0, 1.6, 2.4, 3.4, 4.5)[severity - 1] * _scale(images)
    angle = (_uniform((len(images),), images, generator) - 0.5) * (math.pi / 2)
    return _dragged(images, angle, length)


def fog(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A bright cloud over the image, random at every scale; the image keeps its brightest value."""
    amount, roughness = ((0.2, 0.33), (0.4, 0.36), (0.6, 0.4), (0.9, 0.45), (1.3, 0.5))[severity - 1]
    brightest = images.amax((1, 2, 3), keepdim=True)
    cloud = _cloud(images, roughness, generator)
    return ((images + amount * cloud) * (brightest / (brightest + amount))).clamp(0, 1)


def snow(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Flakes that fall aslant, and a whiter image."""
    share, white = ((0.02, 0.1), (0.035, 0.17), (0.05, 0.24), (0.07, 0.3), (0.1, 0.4))[severity - 1]
    count, _, height, width = images.shape
    flakes = (_uniform((count, 1, height, width), images, generator) < share).to(images.dtype)
    angle = -(0.25 + 0.25 * _uniform((count,), images, generator)) * math.pi
    falling = (2 * _dragged(flakes, angle, 1.5 * _scale(images))).clamp(max=1)
    gray = images.mean(1, keepdim=True)
    paler = torch.maximum(images, 0.5 + 0.5 * gray)
    return ((1 - white) * images + white * paler + falling).clamp(0, 1)


def brightness(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A larger value in HSV, with hue and saturation kept; `generator` is not used."""
    value = images.amax(1, keepdim=True)
    lifted = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]).clamp(max=1)
    ratio = lifted / value.clamp_min(torch.finfo(images.dtype).tiny)
    return torch.where(value > 0, images * ratio, lifted).clamp(0, 1)


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Every channel drawn towards its mean; `generator` is not used."""
    kept = (0.75, 0.6, 0.45, 0.3, 0.15)[severity - 1]
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * kept + mean).clamp(0, 1)


def elastic(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Smooth random displacements, of up to a few pixels."""
    count, _, height, width = images.shape
    furthest = (0.5, 0.8, 1.2, 1.7, 2.3)[severity - 1] * max(0.5, min(height, width) / USUAL_SIDE)
    field = _smooth(2 * _uniform((count, 2, height, width), images, generator) - 1, 0.1 * min(height, width))
    field = field / field.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6) * furthest
    return _moved(images, field[:, 0], field[:, 1])


def pixelate(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Fewer pixels, each an average, enlarged again; `generator` is not used."""
    share = (0.95, 0.85, 0.75, 0.65, 0.5)[severity - 1]
    height, width = (max(1, min(side - severity, int(side * share))) for side in images.shape[2:])
    coarse = _resampled(images, height, width)
    return _resampled(coarse, images.shape[2], images.shape[3]).clamp(0, 1)


def jpeg(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """JPEG compression at a low quality, by Pillow on the CPU; `generator` is not used.

    The batch is encoded as strips of images, each padded to whole blocks, which gives each image the blocks that it
    would have by itself. Images of other than one or three channels are encoded channel by channel.
    """
    quality = (75, 55, 40, 28, 18)[severity - 1]
    whole = images if images.shape[1] in (1, 3) else images.flatten(0, 1)[:, None]
    count, channels, height, width = whole.shape
    tall, wide = (BLOCK * math.ceil(side / BLOCK) for side in (height, width))
    values = (whole * 255).round().to("cpu", torch.float32)
    padded = functional.pad(values, (0, wide - width, 0, tall - height), mode="replicate").to(torch.uint8)
    laid = padded.permute(0, 2, 3, 1).reshape(count * tall, wide, channels)
    decoded = torch.cat([_through_jpeg(strip, quality) for strip in laid.split(tall * max(1, LONGEST // tall))])
    restored = decoded.view(count, tall, wide, channels)[:, :height, :width].permute(0, 3, 1, 2)
    return (restored.to(images) / 255).reshape(images.shape)


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Return one uint8 image (H, W, channels), of one or three channels, as JPEG keeps it."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(2).numpy()).save(file, "JPEG", quality=quality, subsampling=0)
    return torch.from_numpy(np.array(Image.open(file))).view(image.shape)


BLOCK = 8
"""Pixels a side of a JPEG block. Colours keep their resolution, so that no block depends on its neighbours."""
LONGEST = 65_000
"""Rows of an image that JPEG still encodes."""

CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "gaussian_blur": gaussian_blur,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "fog": fog,
    "snow": snow,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W), float in [0, 1], with one corruption at a severity from 1 to 5.

    Raises:
        UsageError: an unknown corruption or severity, or images of another form.
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"unknown corruption {name!r}: one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UsageError(f"a severity is 1, 2, 3, 4 or 5, not {severity!r}")
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < 4:
        raise UsageError(
            f"corruptions take float images (N, C, H, W) of 4 pixels a side at least, not {images.dtype} "
            f"{tuple(images.shape)}"
        )
    return CORRUPTIONS[name](images, severity, generator)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(like.device, like.dtype)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(like.device, like.dtype)


def _scale(images: Tensor) -> float:
    """Return how much longer lengths are than on small images. Below one pixel they would do nothing."""
    return max(1.0, min(images.shape[2:]) / USUAL_SIDE)


def _smooth(images: Tensor, sigma: float) -> Tensor:
    """Return images blurred by a normal kernel of deviation `sigma` pixels, reflected at the border."""
    reach = min(math.ceil(3 * sigma), min(images.shape[2:]) - 1)
    found: Tensor = blurred(images, [2 * reach + 1] * 2, [sigma, sigma])
    return found


def _resampled(images: Tensor, height: int, width: int) -> Tensor:
    """Return images of another size, each pixel the average over the area that it covers."""
    rows, columns = (_overlap(old, new, images) for old, new in zip(images.shape[2:], (height, width), strict=True))
    return rows @ images @ columns.T


def _overlap(old: int, new: int, like: Tensor) -> Tensor:
    """Return the share (new, old) that each old pixel of a line has in each new one."""
    ends = torch.arange(1, new + 1, device=like.device, dtype=like.dtype)[:, None] * (old / new)
    stops = torch.arange(1, old + 1, device=like.device, dtype=like.dtype)
    common = torch.minimum(ends, stops) - torch.maximum(ends - old / new, stops - 1)
    return common.clamp_min(0) * (new / old)


def _dragged(images: Tensor, angle: Tensor, length: float) -> Tensor:
    """Return each image averaged along its angle (N,) over `length` pixels to one side, near ones weighing more."""
    taps = torch.arange(math.ceil(2 * length) + 1, device=images.device, dtype=images.dtype) / 2
    weights = torch.exp(-0.5 * (taps / length).square())
    weights = weights / weights.sum()
    ones = torch.ones(len(images), *images.shape[2:], device=images.device, dtype=images.dtype)
    sideways, down = (turn(angle)[:, None, None] * ones for turn in (torch.cos, torch.sin))
    total = torch.zeros_like(images)
    for tap, weight in zip(taps, weights, strict=True):
        total = total + weight * _moved(images, tap * sideways, tap * down)
    return total.clamp(0, 1)


def _moved(images: Tensor, sideways: Tensor, down: Tensor) -> Tensor:
    """Return images (N, C, H, W) that show at each pixel what lies (sideways, down) pixels (N, H, W) from it."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device, dtype=images.dtype)[:, None] + down
    columns = torch.arange(width, device=images.device, dtype=images.dtype) + sideways
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=3)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _cloud(images: Tensor, roughness: float, generator: torch.Generator) -> Tensor:
    """Return a random cloud (N, 1, H, W) in [0, 1]: grids from coarse to fine, each weaker than the one before."""
    count, _, height, width = images.shape
    total = torch.zeros(count, 1, height, width, device=images.device, dtype=images.dtype)
    cells, weight = 2, 1.0
    while cells <= 2 * max(height, width):
        grid = _uniform((count, 1, cells, cells), images, generator)
        total = total + weight * functional.interpolate(
            grid, size=(height, width), mode="bilinear", align_corners=False, antialias=cells > min(height, width)
        )
        cells, weight = 2 * cells, weight * roughness
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (total - low) / (high - low).clamp_min(1e-6)
