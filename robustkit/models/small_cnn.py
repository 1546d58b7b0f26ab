"""A small CNN that trains quickly: it pools early, so most of its work is on small maps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.models.whitening import Whitening, start_as_identity
from robustkit.params import NonNegativeInt, PositiveInt


class ConvGroup(nn.Module):
    """conv 3x3, 2x2 max-pool, batch norm, GELU, conv 3x3, batch norm, GELU."""

    def __init__(self, inputs: int, outputs: int, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of half the side."""
        x = self.act1(self.norm1(self.pool(self.conv1(x))))
        y: Tensor = self.act2(self.norm2(self.conv2(x)))
        return y


class Residual(nn.Module):
    """Its input plus GELU of a batch norm of a 3x3 convolution of it."""

    branch_end = "act"
    """The module whose output is added to the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return maps like x."""
        y: Tensor = x + self.act(self.norm(self.conv(x)))
        return y


class SmallCnn(nn.Module):
    """One group of two 3x3 convolutions per width, pooled early, GELU, then max over the map and a linear layer.

    Takes images from 8x8 on; a group whose map is a single pixel no longer pools. `whiten` puts a layer in front that
    whitens patches of 2x2 pixels of the training images (Page 2018; Jordan 2024), frozen or trained on from there.
    `dirac` starts each convolution with the identity in its first filters (Zagoruyko & Komodakis 2017, arXiv
    1706.00388). `extra` is how many residual 3x3 convolutions follow each group.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        widths: list[PositiveInt] = [32, 64, 64],  # noqa: B006
        extra: NonNegativeInt = 0,
        whiten: Literal["none", "frozen", "trained"] = "none",
        dirac: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if not widths:
            raise ModelError("small_cnn: `widths` is empty; it needs one width or more, e.g. [32, 64, 64]")
        if min(height, width) < 4:
            raise ModelError(f"small_cnn: images of {height}x{width} are too small; 4x4 is the least")
        side = min(height, width)
        self.whitening = Whitening(channels, trained=whiten == "trained") if whiten != "none" else None
        if self.whitening is not None:
            channels, side = self.whitening.outputs, side - 1
        groups: list[nn.Module] = []
        for outputs in widths:
            groups.append(ConvGroup(channels, outputs, pool=side >= 2))
            groups += [Residual(outputs) for _ in range(extra)]
            channels, side = outputs, max(1, side // 2)
        self.groups = nn.Sequential(*groups)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(channels, classes)
        if dirac:
            for group in (one for one in groups if isinstance(one, ConvGroup)):
                start_as_identity(group.conv1)
                start_as_identity(group.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        x = x if self.whitening is None else self.whitening(x)
        logits: Tensor = self.head(self.pool(self.groups(x)).flatten(1))
        return logits
