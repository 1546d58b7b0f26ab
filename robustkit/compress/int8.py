"""Quantization after training: weights and activations on a grid of 8 bits, or of 4 or 2 to see where it ends."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.compress.pt2e import quantized_graph
from robustkit.compress.qat import FakeQuantization
from robustkit.errors import ModelError
from robustkit.models.fake_quantized import ranges_of
from robustkit.models.program import as_program
from robustkit.models.quantized import Quantization, Quantized
from robustkit.params import PositiveInt
from robustkit.train.hooks import Defense

BATCH = 64
"""Calibration images at a time."""


def quantize(model: nn.Module, images: Tensor, *, bits: int = 8) -> Quantized:
    """Return the quantized model of a plain one, on the CPU; the model is left alone.

    images: (N, C, H, W) in [0, 1], which give the ranges of activations; their SHA-256 is kept, not they. bits: 8, 4 or
    2. A model that was trained with fake quantization has the ranges of its layers' inputs already; they are used.

    Raises:
        UsageError: torchao is not installed.
        ModelError: the model cannot be quantized, or its surrogate answers otherwise than the quantized model.
    """
    shape = (images.shape[1], images.shape[2], images.shape[3])
    ranges = ranges_of(model)
    graph = quantized_graph(model, shape, images.split(BATCH), bits, ranges)
    program, tensors = as_program(graph)
    made = Quantization(
        bits=bits, calibration_images=len(images), calibration_sha256=digest_of(images), trained=ranges is not None
    )
    found = Quantized(program, tensors, made).eval()
    check_surrogate(found, images.cpu().split(BATCH))
    return found


def digest_of(images: Tensor) -> str:
    """Return the SHA-256 of images (N, C, H, W) in [0, 1] as bytes of uint8."""
    levels = (images.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).contiguous()
    return hashlib.sha256(levels.numpy().tobytes()).hexdigest()


@torch.no_grad()
def check_surrogate(model: Quantized, batches: Sequence[Tensor]) -> None:
    """Raise a ModelError unless the surrogate gives the quantized model's logits, bit for bit, on each batch."""
    apart = sum(int((model(x) != model.surrogate(x)).any(1).sum()) for x in batches)
    if apart:
        raise ModelError(
            f"int8: the surrogate that attacks take answers otherwise than the quantized model on {apart} training "
            "images, so that attacks on it would say nothing; drop int8"
        )


@dataclass(frozen=True)
class Int8:
    """Quantize weights and activations, after everything else (Jacob et al. 2018, arXiv 1712.05877).

    `bits`: 8, or 4 or 2 on the same bytes, which shows the curve and makes nothing smaller. `images`: so many training
    images give the ranges of activations. `queries`: of the Square attack on the quantized model itself. `qat`: the
    variant is trained with fake quantization first, with its defenses; the ranges are then those of the training.
    """

    bits: Literal[8, 4, 2] = 8
    images: PositiveInt = 512
    queries: PositiveInt = 1000
    qat: bool = False

    def training(self, context: CompressContext) -> Defense | None:
        """Return what the variant is trained with: fake quantization where `qat` asks for it."""
        return FakeQuantization(self.bits, lambda: context.batch(self.images)[0]) if self.qat else None

    def quantize(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the quantized model.

        Raises:
            UsageError: torchao is not installed.
            ModelError: it cannot be quantized, or its surrogate answers otherwise.
        """
        x, _ = context.batch(self.images)
        found = quantize(model, x, bits=self.bits)
        for line in _told(found.made):
            context.note(line)
        return found.to(x.device)


def _told(made: Quantization) -> list[str]:
    lines = [
        f"int8: {made.bits} bits, ranges from {made.calibration_images} training images (sha256 "
        f"{made.calibration_sha256[:16]}); run by torch as simulated arithmetic, slower until lowered"
    ]
    if made.bits < 8:
        lines.append(f"int8: {made.bits} bits are simulated on bytes: accuracy is real, size and speed are those of 8")
    return lines
