"""Bit-identical results on a GPU: torch's deterministic algorithms, for one training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustkit.errors import TrainingError, UsageError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Let torch use deterministic algorithms alone, where `wanted`; afterwards its settings are as they were.

    Raises:
        UsageError: cuBLAS, which reads its setting when it starts, was not told so from outside.
        TrainingError: an operation of the training has no deterministic form on this device.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in (":4096:8", ":16:8"):
        raise UsageError(
            f"deterministic: true on CUDA needs {WORKSPACE}=:4096:8 in the environment before robustkit starts "
            "(cuBLAS else adds up in an order of its own); set it, or drop `deterministic`"
        )
    algorithms, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(f"deterministic: true: {str(error).splitlines()[0]}") from error
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=only_warn)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
