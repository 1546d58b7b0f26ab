"""Attack a model and leave it, and every random generator, exactly as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model in eval mode with frozen parameters; restore it afterwards, also when an attack raises.

    Restored: the mode of each module, requires_grad, gradients, buffers, and the global generators of torch (CPU and
    CUDA), numpy and Python. Meanwhile no parameter has a gradient, so that an attack that calls `backward` or
    `zero_grad` does not write into the caller's.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    # Before its first use CUDA has no state to keep, and asking would start it on every device.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield model
    finally:
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)
        for module, training in modes:
            module.training = training
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
