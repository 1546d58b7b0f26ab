"""Compressor `onnx`: the variant becomes an ONNX file, float or quantized, and is measured and attacked as that."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.compress.export import agreement, onnx_runner, to_onnx
from robustkit.compress.int8 import digest_of
from robustkit.compress.onnx_int8 import BATCH, to_int8
from robustkit.errors import ModelError
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantization import Quantization
from robustkit.models.quantized import Quantized
from robustkit.params import PositiveInt
from robustkit.train.hooks import Defense

APART = 0.01
"""Such a share of images may the view of a quantized file classify otherwise than the file."""


def as_onnx(model: nn.Module, images: Tensor) -> OnnxModel:
    """Return a model as an ONNX file, checked on images (N, C, H, W) in [0, 1]: logits within 1e-4, equal predictions.

    Of a quantized model the predictions alone are held equal: a runtime may round to the neighbouring step of the grid.

    Raises:
        UsageError: packages of the extra `[onnx]` are missing.
        ModelError: it cannot be exported, or the file answers otherwise.
    """
    plain = copy.deepcopy(model).cpu().eval()
    data = to_onnx(plain.artefact if isinstance(plain, Quantized) else plain, _shape(images))
    made = plain.made.model_copy(update={"runtime": "onnxruntime"}) if isinstance(plain, Quantized) else None
    found = OnnxModel(data, made)
    agreement(plain, onnx_runner(data), images.cpu(), "the ONNX file", exact=made is None)
    return found.eval()


def as_int8_onnx(model: nn.Module, images: Tensor) -> OnnxModel:
    """Return a model as an ONNX file that ONNX Runtime quantized; images (N, C, H, W) in [0, 1] give the ranges.

    Raises:
        UsageError: packages of the extra `[onnx]` are missing.
        ModelError: it cannot be exported or quantized, or its view answers otherwise than the file.
    """
    floating = as_onnx(model, images)
    made = Quantization(
        bits=8, calibration_images=len(images), calibration_sha256=digest_of(images), runtime="onnxruntime"
    )
    found = OnnxModel(to_int8(floating.data, images), made).eval()
    apart, _ = view_differences(found, images.cpu())
    if apart > APART * len(images):
        raise ModelError(
            f"onnx: the view that attacks take classifies {apart} of {len(images)} training images otherwise than ONNX "
            "Runtime does, so that attacks on it would say nothing; drop int8 from onnx"
        )
    return found


@torch.no_grad()
def view_differences(model: OnnxModel, images: Tensor) -> tuple[int, float]:
    """Return how many images (N, C, H, W) a file and its view classify otherwise, and how far their logits are apart.

    The largest difference is over the largest logit where that is above 1.
    """
    blocks = images.split(BATCH)
    ours = torch.cat([model(block) for block in blocks])
    seen = torch.cat([model.view()(block) for block in blocks])
    apart = int((ours.argmax(1) != seen.argmax(1)).sum())
    return apart, float((ours - seen).abs().max()) / max(1.0, float(ours.abs().max()))


@dataclass(frozen=True)
class Onnx:
    """Make an ONNX file of the variant, after everything else; it is what is measured and attacked from then on.

    `int8`: quantized by ONNX Runtime (static, int8 weights per channel, uint8 activations); `images` training images
    give the ranges of activations, `queries` are of the Square attack on the file (both of int8 alone).
    """

    int8: bool = False
    images: PositiveInt = 512
    queries: PositiveInt = 1000

    def training(self, context: CompressContext) -> Defense | None:
        """Return what the variant is trained with to become a file: nothing."""
        return None

    def quantize(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the ONNX model.

        Raises:
            UsageError: packages of the extra `[onnx]` are missing.
            ModelError: it cannot be exported or quantized, or the file answers otherwise.
        """
        x, _ = context.batch(self.images)
        if not self.int8:
            found = as_onnx(model, x)
            logits = "" if found.made is not None else "logits within 1e-4, "
            context.note(f"onnx: {logits}predictions equal to PyTorch's on {len(x)} training images")
            return found
        found = as_int8_onnx(model, x)
        apart, difference = view_differences(found, x.cpu())
        assert found.made is not None
        context.note(
            f"onnx: int8 by ONNX Runtime, ranges from {len(x)} training images (sha256 "
            f"{found.made.calibration_sha256[:16]}); on them the view that attacks take gives other classes than the "
            f"file for {apart}, and logits within {difference:.1e}"
        )
        return found


def _shape(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width
