"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn

from robustkit.errors import ModelError
from robustkit.params import Fraction, PositiveInt


class WideBlock(nn.Module):
    """Pre-activation block: batch norm, ReLU, 3x3, batch norm, ReLU, dropout, 3x3."""

    branch_end = "conv2"
    """The module whose output is added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y = self.act1(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.drop(self.act2(self.norm2(self.conv1(y)))))
        z: Tensor = y + kept
        return z


class WideResNet(nn.Module):
    """Wide residual network: depth 6n + 4, three stages of 16, 32 and 64 channels times the width."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        depth: PositiveInt = 16,
        width: PositiveInt = 4,
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ModelError(f"wide_resnet: depth must be 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        inputs = 16
        for stage, base in enumerate((16, 32, 64)):
            for number in range((depth - 4) // 6):
                stride = 2 if stage and number == 0 else 1
                layers.append(WideBlock(inputs, base * width, stride, dropout))
                inputs = base * width
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(inputs)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        x = self.act(self.norm(self.blocks(self.conv1(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits
