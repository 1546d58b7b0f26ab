"""What a model file says of its architecture: JSON beside the weights, read before any weight is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from robustkit.errors import ModelError
from robustkit.models.build import Shape
from robustkit.models.onnx_model import onnx_metadata
from robustkit.models.quantized_file import QuantizedFile
from robustkit.models.widths import Width

FORMAT = "robustkit/1"
ONNX_SUFFIX = ".onnx"
MAX_SIDE = 65_536
MAX_MEMBERS = 10_000


class Wrapper(BaseModel):
    """An inference wrapper of a model: the defense that makes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    parameters: dict[str, Any] = {}
    members: tuple[Architecture, ...] = Field((), max_length=MAX_MEMBERS)
    """Models that answer beside it, whole: their tensors stand under `wrappers.<number>.members.<number>.`"""


class Architecture(BaseModel):
    """What a model file says of its architecture."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    model: str
    parameters: dict[str, Any] = {}
    shape: Shape
    classes: tuple[str, ...] = Field(min_length=2)
    members: int = Field(0, ge=0, le=MAX_MEMBERS)
    """So many models of this architecture vote; 0: it is one model, which answers itself."""
    widths: dict[str, Width] = {}
    """Layers that are narrower than the model's own, by name: those of a shrunk model."""
    wrappers: tuple[Wrapper, ...] = ()
    """From the inside out."""
    quantized: QuantizedFile | None = None
    """Of a quantized model: its graph, which does not follow from the architecture alone."""


def is_model_file(path: Path) -> bool:
    """Say whether a file is safetensors with an architecture of robustkit's; a broken one counts if it is named so.

    Raises:
        ModelError: there is no such file, or it is named .safetensors and cannot be read.
    """
    if path.is_file() and path.suffix not in (".safetensors", ONNX_SUFFIX):
        return False
    return "robustkit" in _metadata(path)


def read_architecture(path: Path) -> Architecture:
    """Return what a model file says of itself.

    Raises:
        ModelError: no such file, not safetensors, truncated, or not written by robustkit.
    """
    metadata = _metadata(path)
    if "robustkit" not in metadata:
        raise ModelError(
            f"{path}: holds weights but no robustkit architecture; robustkit.load_weights and `robustkit attack "
            "--model` take the model's name beside it"
        )
    try:
        found = Architecture.model_validate(json.loads(metadata["robustkit"]))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its architecture cannot be read: {error}") from error
    if found.format != FORMAT:
        raise ModelError(f"{path}: written in format {found.format!r}; this version reads {FORMAT!r}")
    if not all(1 <= side <= MAX_SIDE for side in found.shape):
        raise ModelError(f"{path}: images of shape {found.shape} are absurd")
    return found


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.suffix == ONNX_SUFFIX:
        return onnx_metadata(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        if _pickled(path):
            raise ModelError(
                f"{path}: a pickle or a file of torch.save, which can run code; robustkit.load reads safetensors. "
                "A state dict is read by robustkit.load_weights and `robustkit attack --model`"
            ) from error
        raise ModelError(f"{path}: not a safetensors file, or a truncated one: {error}") from error


def _pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
