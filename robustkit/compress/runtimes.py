"""What runs a model: PyTorch as it stands, compiled by inductor, or ONNX Runtime."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.compress.export import ONNX_PACKAGES, is_there, to_onnx
from robustkit.errors import ModelError, RobustkitError

Run = Callable[[Tensor], object]
Prepared = Callable[[Tensor], Run]
"""Images (N, C, H, W) -> what runs on such a batch, with the threads that torch has now."""


def prepare(model: nn.Module, runtime: str, shape: tuple[int, int, int]) -> Prepared:
    """Return what makes a model in eval mode run in `eager`, `inductor` or `onnxruntime`.

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
    """Return the model compiled whole for batches like x, its weights frozen into the code (inductor's `freezing`).

    Raises:
        ModelError: there is no compiler, or a part of the model cannot be compiled.
    """
    if x.device.type == "cpu" and not any(shutil.which(one) for one in (os.environ.get("CXX", "g++"), "clang++")):
        raise ModelError("inductor needs a C++ compiler: install g++, or set CXX")
    run: Run = torch.compile(model, fullgraph=True, dynamic=False)
    try:
        with compiling(), torch.inference_mode():
            run(x)
    except Exception as error:  # the compiler raises whatever a part of it does
        raise ModelError(f"inductor cannot compile it: {_first_line(error)}") from error

    def again(images: Tensor) -> object:
        with compiling():
            return run(images)

    return again


@contextmanager
def compiling() -> Iterator[None]:
    """Freeze weights, and let many models share code: past its limit torch.compile would run them eagerly, unsaid."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), dynamo.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000):
        yield


def forget_compiled() -> None:
    """Drop what torch.compile has kept."""
    import torch._dynamo

    torch._dynamo.reset()


def _onnx(model: nn.Module, shape: tuple[int, int, int]) -> bytes:
    missing = [one for one in ONNX_PACKAGES if not is_there(one)]
    if missing:
        raise ModelError(f"{', '.join(missing)} is not installed: pip install 'robustkit[onnx]'")
    return to_onnx(model, shape)


def onnx_run(data: bytes, x: Tensor) -> Run:
    """Return what runs an ONNX file on a batch in ONNX Runtime on the CPU, with as many threads as torch has."""
    session = onnx_session(data)
    feed = {"image": x.numpy()}
    return lambda images: session.run(["logits"], feed)


def onnx_session(data: bytes) -> Any:  # noqa: ANN401
    """Return a session of ONNX Runtime on the CPU, with as many threads as torch has now.

    Raises:
        ModelError: ONNX Runtime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads would go on spinning while another model is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise ModelError(f"ONNX Runtime does not take the file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, RobustkitError) else f"{type(error).__name__}: {text}"
