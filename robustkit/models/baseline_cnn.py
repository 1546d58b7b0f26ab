"""The plain CNN that everything else is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.params import Fraction, NonNegativeInt, PositiveInt

KERNEL = 5
POOL = 2


class Extra(nn.Module):
    """conv 3x3, batch norm where it is asked for, ReLU: as many maps of the same size."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return maps like x."""
        y: Tensor = self.relu(self.norm(self.conv(x)))
        return y


class BaselineCnn(nn.Module):
    """5x5 conv 64, max-pool, ReLU, 5x5 conv 128, max-pool, ReLU, linear 1,024, ReLU, classes.

    The convolutions are not padded, so 28x28 images end in 128 maps of 4x4; the first linear layer is as wide as the
    input asks for. `residual` adds a 1x1 convolution around the second convolution (He et al. 2016, the input cropped
    to the output's size); `dropout` is the share that is dropped before each linear layer. `widths` and `hidden` count
    the maps and the hidden units; `extra` is how many 3x3 convolutions with ReLU follow the second pooling.

    Raises:
        ModelError: the images are too small for two 5x5 convolutions with pooling (less than 16 pixels a side), or
            `widths` are not two.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        batch_norm: bool = False,
        residual: bool = False,
        dropout: Fraction = 0.0,
        widths: list[PositiveInt] = [64, 128],  # noqa: B006
        hidden: PositiveInt = 1024,
        extra: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if len(widths) != 2:
            raise ModelError(f"baseline_cnn: `widths` are those of its two convolutions, e.g. [64, 128], not {widths}")
        first, second = widths
        rows, columns = flat_size(height, "height"), flat_size(width, "width")
        self.conv1 = nn.Conv2d(channels, first, KERNEL)
        self.norm1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(first, second, KERNEL)
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.shortcut = nn.Conv2d(first, second, 1) if residual else None
        self.pool = nn.MaxPool2d(POOL)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()
        self.drop1 = nn.Dropout(dropout)
        self.drop2 = nn.Dropout(dropout)
        self.extra = nn.Sequential(*(Extra(second, batch_norm) for _ in range(extra)))
        self.fc1 = nn.Linear(second * rows * columns, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    @property
    def branch_end(self) -> str | None:
        """The module whose output is added to the shortcut; None without one."""
        return None if self.shortcut is None else "norm2"

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        y = self.extra(self.maps(x))
        y = self.relu3(self.fc1(self.drop1(y.flatten(1))))
        logits: Tensor = self.fc2(self.drop2(y))
        return logits

    def maps(self, x: Tensor) -> Tensor:
        """Return the maps after the second pooling, before any extra convolution."""
        x = self.relu1(self.pool(self.norm1(self.conv1(x))))
        y = self.norm2(self.conv2(x))
        if self.shortcut is not None:
            crop = KERNEL // 2
            y = y + self.shortcut(x[:, :, crop:-crop, crop:-crop])
        found: Tensor = self.relu2(self.pool(y))
        return found


def flat_size(side: int, name: str) -> int:
    """Return how many pixels of `side` are left before the first linear layer."""
    left = side
    for layer in ("conv1", "conv2"):
        convolved = left - KERNEL + 1
        if convolved < POOL:
            raise ModelError(
                f"baseline_cnn: layer {layer} (5x5, then 2x2 pooling) cannot take a {name} of {left}; images of "
                f"{name} {side} are too small, 16 is the least. Scale them, e.g. data: {{digits: {{size: 28}}}}"
            )
        left = convolved // POOL
    return left
