"""A quantized model as code for this processor, through torch's inductor: what its latency is measured on."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.compress.pt2e import register_kernels
from robustkit.models.quantized import Quantized

Run = Callable[[Tensor], Tensor]


def lowered(model: nn.Module) -> Run:
    """Return what runs a model through inductor with frozen weights; a quantized one in int8 kernels on x86.

    The first call for a batch size compiles, which takes a minute or so and needs a C++ compiler. Logits are close to
    the model's, not bit-equal to them. Where there are no int8 kernels for an operation it is run in floats.

    Raises:
        UsageError: the model is quantized, and torchao, which has the kernels' patterns, is not installed.
    """
    import torch._inductor.config as config

    if isinstance(model, Quantized):
        register_kernels()
    inner = model.artefact if isinstance(model, Quantized) else model
    compiled = torch.compile(inner.eval(), dynamic=False)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
            # Inductor's own, while it compiles a quantized layer.
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
            logits: Tensor = compiled(x)
        return logits

    return run
