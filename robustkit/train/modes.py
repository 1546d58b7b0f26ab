"""How a model is attacked, or looked at in eval mode, and afterwards exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Buffers = list[tuple[nn.Module, str, Tensor]]
"""Buffers with the modules that hold them, and their names there."""


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
    """Put the model into eval mode with its parameters as they are; restore the modes, module by module.

    A graph that is made meanwhile holds copies of the buffers: batch norms' statistics may move on before its backward.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = buffers_of(model)
    try:
        model.eval()
        put_buffers(copied(buffers))
        yield
    finally:
        put_buffers(buffers)
        for module, training in modes:
            module.training = training


def buffers_of(model: nn.Module) -> Buffers:
    """Return the buffers of a model, not copied."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def copied(buffers: Buffers) -> Buffers:
    """Return copies of buffers, for the same places."""
    return [(module, name, buffer.detach().clone()) for module, name, buffer in buffers]


def put_buffers(buffers: Buffers) -> None:
    """Put buffers in their places: these tensors, and not their values into those that are there."""
    for module, name, buffer in buffers:
        module._buffers[name] = buffer


def is_replaced(model: nn.Module) -> bool:
    """Say whether something else than its class's forward computes a module: gradient checkpointing, torch.compile."""
    return any("forward" in vars(one) or vars(one).get("_compiled_call_impl") is not None for one in model.modules())
