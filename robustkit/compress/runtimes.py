"""What runs a model: PyTorch as it stands, compiled by inductor, or ONNX Runtime."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustkit.compress.export import to_onnx
from robustkit.compress.pt2e import register_kernels
from robustkit.errors import ModelError, RobustkitError
from robustkit.models.onnx_model import OnnxModel, missing_onnx_packages, onnx_session
from robustkit.models.quantized import Quantized

Run = Callable[[Tensor], object]
Prepared = Callable[[Tensor], Run]
"""Images (N, C, H, W) -> what runs on such a batch, with the threads that torch has now."""


def prepare(model: nn.Module, runtime: str, shape: tuple[int, int, int]) -> Prepared:
    """Return what makes a model in eval mode run in `eager`, `inductor` or `onnxruntime`; an ONNX file in the last.

    Raises:
        ModelError: it does not run there; the message says why.
    """
    model.eval()
    if runtime == "eager":
        return lambda x: model
    if runtime == "inductor":
        return lambda x: compiled(model, x)
    data = _onnx(model, shape)
    return lambda x: onnx_run(data, x)


def compiled(model: nn.Module, x: Tensor) -> Run:
    """Return the model compiled whole for batches like x, its weights frozen into the code; call it in `compiling()`.

    Raises:
        ModelError: there is no compiler, or a part of the model cannot be compiled.
    """
    if x.device.type == "cpu" and not any(shutil.which(one) for one in (os.environ.get("CXX", "g++"), "clang++")):
        raise ModelError("inductor needs a C++ compiler: install g++, or set CXX")
    if isinstance(model, Quantized):
        register_kernels()
        model = model.artefact
    run: Run = torch.compile(model, fullgraph=True, dynamic=False)
    try:
        with torch.inference_mode():
            run(x)
    except Exception as error:  # the compiler raises whatever a part of it does
        raise ModelError(f"inductor cannot compile it: {_first_line(error)}") from error
    return run


@contextmanager
def compiling() -> Iterator[None]:
    """Freeze weights, and let many models share code: past its limit torch.compile would run them eagerly, unsaid."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    limits = dynamo.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)
    with inductor.patch(freezing=True), limits, warnings.catch_warnings():
        # Inductor's own, while it compiles a quantized layer.
        warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
        yield


def forget_compiled() -> None:
    """Drop what torch.compile has kept."""
    import torch._dynamo

    torch._dynamo.reset()


def _onnx(model: nn.Module, shape: tuple[int, int, int]) -> bytes:
    if isinstance(model, OnnxModel):
        return model.data
    missing = missing_onnx_packages()
    if missing:
        raise ModelError(f"{', '.join(missing)} is not installed: pip install 'robustkit[onnx]'")
    return to_onnx(model.artefact if isinstance(model, Quantized) else model, shape)


def onnx_run(data: bytes, x: Tensor) -> Run:
    """Return what runs an ONNX file on a batch in ONNX Runtime on the CPU, with as many threads as torch has."""
    session = onnx_session(data)
    feed = {"image": x.numpy()}
    return lambda images: session.run(["logits"], feed)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, RobustkitError) else f"{type(error).__name__}: {text}"
