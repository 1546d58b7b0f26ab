"""How a model is attacked, or looked at in eval mode, and afterwards exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into eval mode and freeze its parameters; restore both, module by module, also on an error.

    Frozen parameters keep the backward of an attack from computing weight gradients that nobody uses.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode with its parameters as they are; restore the modes, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
