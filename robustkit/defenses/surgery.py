"""Layers put into a model for the training and taken out again, without a change to any name in its state_dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_PREFIX = "inserted_"
_HANDLE = "_hook"
_GUESTS = (_PREFIX, "parametrizations")


def attach(module: nn.Module, layer: nn.Module, kind: str, *, before: bool = False) -> None:
    """Put a layer without parameters behind the module's output, or before its input; one of each kind."""
    name = _PREFIX + kind
    layer.train(module.training)
    module.add_module(name, layer)
    # The handle is kept on the module: a deepcopy gets a handle of its own, which removes the copy's hook.
    setattr(module, name + _HANDLE, _hook(module, name, before))


def detach(model: nn.Module, kind: str) -> nn.Module:
    """Take out what attach put in under this kind (also from a deepcopy of that model) and return the model."""
    name = _PREFIX + kind
    for module in list(model.modules()):
        if hasattr(module, name):
            getattr(module, name + _HANDLE).remove()
            delattr(module, name + _HANDLE)
            delattr(module, name)
    return model


def attached(model: nn.Module, kind: str) -> list[nn.Module]:
    """Return the layers that attach put in under this kind."""
    name = _PREFIX + kind
    return [module.get_submodule(name) for module in model.modules() if hasattr(module, name)]


def leaves(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model's own modules without children, in order: without what was put into it."""
    children = [child for name, child in model.named_children() if not name.startswith(_GUESTS)]
    if not children:
        yield model
    for child in children:
        yield from leaves(child)


class _Before:
    """Calls a module's layer on its input; a class of its own, so that a copied model finds the copy's layer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (module.get_submodule(self.name)(arguments[0]), *arguments[1:])


class _After:
    """Calls a module's layer on its output."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        changed: Tensor = module.get_submodule(self.name)(output)
        return changed


def _hook(module: nn.Module, name: str, before: bool) -> RemovableHandle:
    if before:
        return module.register_forward_pre_hook(_Before(name))
    return module.register_forward_hook(_After(name))
