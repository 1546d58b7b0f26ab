"""How a model was quantized, as its file and the results say it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Quantization(BaseModel):
    """How a model was quantized: bits, and the training images that gave the ranges of its activations."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bits: int = Field(ge=2, le=8)
    calibration_images: int = Field(ge=0)
    calibration_sha256: str = ""
    """Of the images as they lie in memory, uint8 (N, C, H, W)."""
    trained: bool = False
    """Whether it was trained with fake quantization."""
    runtime: Literal["torch", "onnxruntime"] = "torch"
    """What runs it, and so judges attacks: PyTorch bit for bit as its surrogate, or ONNX Runtime."""
