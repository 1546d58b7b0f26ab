"""A model as code for this processor, through torch's inductor: a quantized one in int8 kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.compress.runtimes import Run, compiled, compiling


def lowered(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what runs a model through inductor with frozen weights; a quantized one in int8 kernels on x86.

    The first call for a shape of images (N, C, H, W) compiles, which takes a minute or so and needs a C++ compiler.
    Logits (N, classes) are close to the model's, not bit-equal to them. Where there are no int8 kernels for an
    operation it is run in floats.

    Raises, when called:
        UsageError: the model is quantized, and torchao, which has the kernels' patterns, is not installed.
        ModelError: there is no compiler, or a part of the model cannot be compiled.
    """
    model.eval()
    made: dict[tuple[int, ...], Run] = {}

    def run(x: Tensor) -> Tensor:
        with compiling(), torch.inference_mode():
            if tuple(x.shape) not in made:
                made[tuple(x.shape)] = compiled(model, x)
            logits = made[tuple(x.shape)](x)
        assert isinstance(logits, Tensor)
        return logits

    return run
