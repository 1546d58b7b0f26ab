"""ResNet-18 with a stem for small images (He et al. 2016, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn

from robustkit.params import PositiveInt


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity or 1x1 shortcut."""

    branch_end = "norm2"
    """The module whose output is added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's maps."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        z: Tensor = self.act2(y + self.shortcut(x))
        return z


class ResNet(nn.Module):
    """Basic blocks in stages of doubling width, after a 3x3 stem that keeps the image's size."""

    def __init__(self, shape: tuple[int, int, int], classes: int, blocks: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for number in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        x = self.blocks(self.act1(self.norm1(self.conv1(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def resnet18(shape: tuple[int, int, int], classes: int, width: PositiveInt = 64) -> ResNet:
    """ResNet-18 with a 3x3 stem for small images; 11.2 million parameters at width 64."""
    return ResNet(shape, classes, (2, 2, 2, 2), width)
