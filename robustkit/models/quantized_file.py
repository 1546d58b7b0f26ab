"""Quantized models as files: bytes for weights, the graph as plain data. Checked before anything is read or made."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robustkit.errors import ModelError
from robustkit.models.program import Program, check_program
from robustkit.models.quantized import Quantization, Quantized

TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class QuantizedFile(BaseModel):
    """What a model's file says of its quantization."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    made: Quantization
    program: Program


def load_quantized(path: Path, described: QuantizedFile, shape: tuple[int, int, int], classes: int) -> Quantized:
    """Return the quantized model of a file, bit for bit the one that was saved.

    Raises:
        ModelError: its graph does not run on its tensors, or gives something else than logits; truncated or broken.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: _shape_of(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
            check_program(described.program, shapes, shape, classes)
            # Copies: where a tensor lies in the file decides its alignment, and that the last bit of some sums.
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except ModelError as error:
        raise ModelError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: truncated or broken: {error}") from error
    return Quantized(described.program, tensors, described.made).eval()


def _shape_of(path: Path, name: str, found: object) -> Tensor:
    """Return a tensor of the file on the meta device."""
    dtype = TYPES.get(found.get_dtype())  # type: ignore[attr-defined]
    if dtype is None:
        raise ModelError(f"{path}: {name} is {found.get_dtype()}, which no quantized model has")  # type: ignore[attr-defined]
    return torch.empty(found.get_shape(), dtype=dtype, device="meta")  # type: ignore[attr-defined]
