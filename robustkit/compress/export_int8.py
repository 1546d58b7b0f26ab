"""A float model as an int8 one for other programs, quantized by what the file's format is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.compress.export import BATCH, Format
from robustkit.compress.int8 import quantize
from robustkit.compress.onnx_artefact import as_int8_onnx
from robustkit.errors import UsageError
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized

CALIBRATION = 512
"""Training images that give the ranges of activations."""


@dataclass(frozen=True)
class Changed:
    """How an int8 model answers beside the float one that it is of, on the same test images.

    `predictions` of `images` differ. `calibration_images` training images of that SHA-256 (uint8, N x C x H x W) gave
    the ranges.
    """

    predictions: int
    images: int
    calibration_images: int
    calibration_sha256: str


def as_int8(model: nn.Module, kind: Format, training: Tensor) -> OnnxModel | Quantized:
    """Return the int8 model of a float one: of ONNX Runtime for onnx, else PyTorch's (extra `[int8]`).

    training: (N, C, H, W) in [0, 1], which give the ranges of activations.

    Raises:
        UsageError: packages are missing, or the model is int8 already.
        ModelError: it cannot be quantized.
    """
    if isinstance(model, OnnxModel | Quantized) and model.made is not None:
        raise UsageError("the variant is int8 already: leave --int8 out")
    if isinstance(model, OnnxModel):
        raise UsageError("the variant is a float ONNX file: export the variant that it was made of with --int8")
    return as_int8_onnx(model, training) if kind == "onnx" else quantize(model, training)


@torch.no_grad()
def changed_by(model: nn.Module, int8: OnnxModel | Quantized, images: Tensor) -> Changed:
    """Return how an int8 model's answers on images (N, C, H, W) in [0, 1] differ from the float model's."""
    assert int8.made is not None
    apart = sum(int((model(block).argmax(1) != int8(block).argmax(1)).sum()) for block in images.split(BATCH))
    return Changed(apart, len(images), int8.made.calibration_images, int8.made.calibration_sha256)
