"""Inference wrappers that change the images: nothing is trained, the model sees purified images when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robustkit.attacks.adaptive import Bpda
from robustkit.errors import ModelError, UsageError
from robustkit.params import Bits, PositiveInt, Quality
from robustkit.train.hooks import Defense

MOST_BITS = 8


def reduce_bit_depth(x: Tensor, bits: int) -> Tensor:
    """Return images rounded to 2**bits levels a channel (feature squeezing, Xu et al. 2018).

    x: any shape, in [0, 1]; so is the result. Its gradient is zero everywhere.
    """
    levels = float((1 << bits) - 1)
    return (x * levels).round() / levels


def median_filter(x: Tensor, size: int) -> Tensor:
    """Return images whose pixels are medians of size x size neighbourhoods (spatial smoothing, Xu et al. 2018).

    x: (N, C, H, W). Borders are mirrored; of an even number of values the lower middle one is taken.

    Raises:
        ModelError: the neighbourhood is larger than the image.
    """
    windows = _padded(x, size).unfold(2, size, 1).unfold(3, size, 1)
    return windows.flatten(4).median(-1).values


def mean_filter(x: Tensor, size: int) -> Tensor:
    """Return images (N, C, H, W) whose pixels are means of the neighbourhoods that median_filter looks at."""
    return nn.functional.avg_pool2d(_padded(x, size), size, stride=1)


def _padded(x: Tensor, size: int) -> Tensor:
    before, after = size // 2, (size - 1) // 2
    if before >= min(x.shape[-2:]):
        raise ModelError(f"median_filter: size {size} is too large for images of {tuple(x.shape[-2:])}; lower it")
    return nn.functional.pad(x, (before, after, before, after), mode="reflect")


def compress_jpeg(x: Tensor, quality: int) -> Tensor:
    """Return images as they come out of a JPEG file (Guo et al. 2018; Dziugaite et al. 2016).

    x: (N, C, H, W) in [0, 1] with one or three channels; quality: 1 to 100. Its gradient is zero everywhere.

    Raises:
        ModelError: other numbers of channels.
    """
    if x.shape[1] not in (1, 3):
        raise ModelError(f"jpeg: images have {x.shape[1]} channels; JPEG files have 1 or 3: drop `jpeg`")
    if x.is_meta or not len(x):
        return x * 0
    levels = (x.detach() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    # Encoders take one image at a time.
    files = torch.stack([_through_file(image, quality) for image in levels]).to(x.device, x.dtype) / 255
    # A zero gradient, as that of rounding, and not none: attacks that ask for one go on.
    return files + 0 * x


def _through_file(image: Tensor, quality: int) -> Tensor:
    """Return an image (C, H, W) uint8 as Pillow reads it from a JPEG file of this quality."""
    values = image.permute(1, 2, 0).numpy()
    with BytesIO() as file:
        Image.fromarray(values[..., 0] if len(image) == 1 else values).save(file, "JPEG", quality=quality)
        read = np.array(Image.open(file))
    return torch.from_numpy(read).reshape(values.shape).permute(2, 0, 1)


class Preprocessed(nn.Module):
    """A model that sees images through `preprocess`."""

    def __init__(self, preprocess: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.model = preprocess, model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of the preprocessed images."""
        logits: Tensor = self.model(self.preprocess(x))
        return logits


def _preprocessed(wrapped: nn.Module) -> Preprocessed:
    if not isinstance(wrapped, Preprocessed):
        raise UsageError(f"attack_view takes what wrap returned, not a {type(wrapped).__name__}")
    return wrapped


@dataclass(frozen=True)
class BitDepth(Defense):
    """Round images to 2**bits levels when the model is asked (Xu et al. 2018); nothing is trained.

    Attacked as it is, and with the rounding passed over on the way back (BPDA).
    """

    bits: Bits = 4

    def __post_init__(self) -> None:
        """Refuse depths that images do not have."""
        if not 1 <= self.bits <= MOST_BITS:
            raise UsageError(f"bit_depth: bits is {self.bits}; images have 8 bits: 1 to 8")

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model behind the rounding."""
        return Preprocessed(self._purify, model)

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the same function, with the gradient of the identity for the rounding."""
        inside = _preprocessed(wrapped)
        return Bpda(inside.preprocess, inside.model)

    def _purify(self, x: Tensor) -> Tensor:
        return reduce_bit_depth(x, self.bits)


@dataclass(frozen=True)
class Jpeg(Defense):
    """Send images through JPEG compression when the model is asked (Guo et al. 2018); nothing is trained.

    quality: 1 to 100. Attacked as it is, and with the compression passed over on the way back (BPDA).
    """

    quality: Quality = 75

    def __post_init__(self) -> None:
        """Refuse qualities that JPEG does not have."""
        if not 1 <= self.quality <= 100:
            raise UsageError(f"jpeg: quality is {self.quality}; 1 (small) to 100 (exact) are possible")

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model behind the compression."""
        return Preprocessed(self._purify, model)

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the same function, with the gradient of the identity for the compression."""
        inside = _preprocessed(wrapped)
        return Bpda(inside.preprocess, inside.model)

    def _purify(self, x: Tensor) -> Tensor:
        return compress_jpeg(x, self.quality)


@dataclass(frozen=True)
class MedianFilter(Defense):
    """Take medians of size x size neighbourhoods when the model is asked (Xu et al. 2018); nothing is trained.

    Attacked as it is, and with the neighbourhoods' means for the way back (BPDA).
    """

    size: PositiveInt = 3

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model behind the filter."""
        return Preprocessed(self._purify, model)

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the same function, with the gradient of the mean for the median."""
        inside = _preprocessed(wrapped)
        return Bpda(inside.preprocess, inside.model, self._smooth)

    def _purify(self, x: Tensor) -> Tensor:
        return median_filter(x, self.size)

    def _smooth(self, x: Tensor) -> Tensor:
        return mean_filter(x, self.size)
