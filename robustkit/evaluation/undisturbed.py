"""Attack a model and leave it, and every random generator, exactly as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Give the model in eval mode with frozen parameters; restore it afterwards, also when an attack raises.

    Restored: the mode of each module, requires_grad, gradients, buffers, tensors that are plain attributes, and the
    global generators of torch (CPU and CUDA), numpy and Python. Meanwhile no parameter has a gradient, so that an
    attack that calls `backward` or `zero_grad` does not write into the caller's.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    tensors = [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in _tensors_of(module)
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
            for module, name, tensor, value in tensors:
                # Writing the same values again would spoil a backward that still needs this tensor.
                if not _equal(tensor, value):
                    tensor.copy_(value)
                setattr(module, name, tensor)
        for module, training in modes:
            module.training = training
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and plain attributes, such as the weight that pruning and old-style spectral norm set in a hook."""
    yield from module.named_buffers(recurse=False)
    yield from [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]


def _equal(tensor: Tensor, value: Tensor) -> bool:
    if tensor.is_meta:
        return True
    # Sparse tensors cannot be compared.
    return tensor.layout == torch.strided and torch.equal(tensor, value)
