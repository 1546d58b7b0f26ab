"""Models for other runtimes: torch.export's pt2 and ONNX, and the check of what they answer on real images."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError, UsageError, did_you_mean
from robustkit.models.onnx_model import onnx_session, require_onnx

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["safetensors", "onnx", "pt2"]
FORMATS: tuple[Format, ...] = get_args(Format)
TOLERANCE = 1e-4
"""How far logits of the file may be from the model's, for logits up to 1 (else relative)."""
MAX_BATCH = 65_536
BATCH = 64
Run = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, classes), by the file alone."""


@dataclass(frozen=True)
class Agreement:
    """How the file answers beside the model: the largest difference of logits (over the largest logit if above 1)."""

    difference: float
    images: int


def check_format(name: str) -> Format:
    """Return a format that can be written here.

    Raises:
        UsageError: there is no such format, or packages that it needs are not installed.
    """
    found = next((one for one in FORMATS if one == name), None)
    if found is None:
        raise UsageError(f"unknown format {name!r}; {did_you_mean(name, FORMATS) or 'one of ' + ', '.join(FORMATS)}")
    if found == "onnx":
        require_onnx("--format onnx")
    return found


def to_pt2(model: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """Return a model as a program of torch.export, for batches of 1 to 65,536 images (C, H, W) in [0, 1].

    The example inputs that such a file holds are zeros. Read it with `torch.export.load`, which runs code that is in
    the file: only where you trust who wrote it.

    Raises:
        ModelError: torch.export cannot trace the model.
    """
    program = _traced(model, shape)
    for node in program.graph.nodes:
        # Where in whose files each operation was called.
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def to_onnx(model: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """Return a model as one ONNX file: `image` (batch, C, H, W) in [0, 1] to `logits` (batch, classes), no outer data.

    Raises:
        ModelError: the model cannot be traced, or has an operation that ONNX lacks.
        UsageError: the packages are not installed.
    """
    check_format("onnx")
    program: Any = torch.onnx.export(
        _traced(model, shape),
        (),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    for node in program.model.graph:
        # The exporter notes where in whose files each operation was called.
        node.metadata_props.clear()
    return bytes(program.model_proto.SerializeToString())


def _traced(model: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    # Two images: with one the batch would be taken for a constant.
    zeros = torch.zeros(2, *shape)
    try:
        return torch.export.export(
            model.eval(), (zeros,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},), strict=False
        )
    except Exception as error:  # the tracer raises whatever an operation of the model does
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"the model cannot be exported: {type(error).__name__}: {first}") from error


def pt2_runner(data: bytes) -> Run:
    """Return what runs a program that this process has just written."""
    module = torch.export.load(io.BytesIO(data)).module()

    def run(images: Tensor) -> Tensor:
        logits: Tensor = module(images)
        return logits

    return run


def onnx_runner(data: bytes) -> Run:
    """Return what runs an ONNX file in ONNX Runtime on the CPU."""
    session = onnx_session(data)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])

    return run


@torch.no_grad()
def agreement(model: nn.Module, run: Run, images: Tensor, what: str, *, exact: bool = True) -> Agreement:
    """Compare a file's answers on images (N, C, H, W) float32 in [0, 1] with the model's, one and many at a time.

    exact: logits must agree; without it, for quantized models, predictions alone.

    Raises:
        ModelError: logits differ by more than 1e-4 (relative to the largest if above 1), or a prediction differs.
    """
    model.eval()
    first = len(images[:1])
    blocks = [images[:first], *images[first:].split(BATCH)] if len(images) > first else [images]
    ours = torch.cat([model(block) for block in blocks]).float()
    theirs = torch.cat([run(block) for block in blocks]).float()
    apart = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
    changed = int((ours.argmax(1) != theirs.argmax(1)).sum())
    allowed = f"{TOLERANCE:g}" if exact else "any step of its grid"
    if (exact and not apart <= TOLERANCE) or changed or not math.isfinite(apart):
        raise ModelError(
            f"{what}: its logits are {apart:.2g} from the model's ({allowed} is allowed) and {changed} of "
            f"{len(images)} predictions differ; nothing was written"
        )
    return Agreement(apart, len(images))
