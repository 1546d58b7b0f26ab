"""Dropout by surgery: put into any model for the training, taken out again before the model is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from robustkit.errors import UsageError
from robustkit.params import Fraction
from robustkit.train.hooks import Defense

CHILD = "inserted_dropout"
_HANDLE = "inserted_dropout_hook"


def insert_dropout(model: nn.Module, *, p: float, conv: float = 0.0) -> nn.Module:
    """Insert dropout into the model in place and return it (Srivastava et al. 2014; Tompson et al. 2015).

    p: chance that a hidden input of a linear layer is dropped. conv: chance that a whole channel is dropped after a
    convolution, behind the batch norm where one follows it. The input image itself is never dropped. No parameter
    name and no key of the state_dict changes; in eval mode the model computes exactly what it did.
    Raises UsageError where the model has no such place, or has inserted dropout already.
    """
    if any(hasattr(module, CHILD) for module in model.modules()):
        raise UsageError("dropout was inserted into this model already: use `dropout` once, with p and conv")
    linears, convolutions = places(model)
    if p > 0 and not linears and not (conv > 0 and convolutions):
        raise UsageError(
            "dropout finds no linear layer with hidden inputs in this model: "
            + ("set conv, for dropout after its convolutions" if convolutions else "it has no hidden layer to drop")
        )
    if conv > 0 and not convolutions:
        raise UsageError("dropout: conv is set, and this model has no convolution")
    for module in linears if p > 0 else ():
        _attach(module, nn.Dropout(p), before=True)
    for module in convolutions if conv > 0 else ():
        _attach(module, nn.Dropout2d(conv), before=False)
    return model


def remove_dropout(model: nn.Module) -> nn.Module:
    """Take out what insert_dropout put in (also from a deepcopy of that model) and return the model."""
    for module in list(model.modules()):
        if hasattr(module, CHILD):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)
            delattr(module, CHILD)
    return model


def attach_dropout(model: nn.Module, layer: Callable[[int], nn.Module]) -> nn.Module:
    """Put `layer(number)` before each linear layer with hidden inputs, in place, and return the model.

    Raises UsageError where the model has no such layer.
    """
    linears, _ = places(model)
    if not linears:
        raise UsageError("mc_dropout finds no linear layer with hidden inputs in this model: choose another defense")
    for number, module in enumerate(linears):
        _attach(module, layer(number), before=True)
    return model


def places(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the linear layers with hidden inputs, and the modules after which a convolution's output is final."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    parametrised = [module for module in leaves if next(module.parameters(recurse=False), None) is not None]
    # The first layer with parameters sees the image itself.
    linears: list[nn.Module] = [
        module
        for module in parametrised[1:]
        # Attention reads this layer's weights without calling it.
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    outputs: list[nn.Module] = []
    for position, module in enumerate(leaves):
        if isinstance(module, nn.Conv2d):
            after = leaves[position + 1] if position + 1 < len(leaves) else None
            follows = isinstance(after, nn.BatchNorm2d) and after.num_features == module.out_channels
            outputs.append(after if follows and after is not None else module)
    return linears, outputs


def _attach(module: nn.Module, dropout: nn.Module, *, before: bool) -> None:
    dropout.train(module.training)
    module.add_module(CHILD, dropout)
    # The handle is kept on the module: a deepcopy gets a handle of its own, which removes the copy's hook.
    setattr(module, _HANDLE, _hook(module, before))


def _hook(module: nn.Module, before: bool) -> RemovableHandle:
    if before:
        return module.register_forward_pre_hook(_drop_input)
    return module.register_forward_hook(_drop_output)


def _drop_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dropout = module.get_submodule(CHILD)
    return (dropout(arguments[0]), *arguments[1:])


def _drop_output(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    dropped: Tensor = module.get_submodule(CHILD)(output)
    return dropped


@dataclass(frozen=True)
class Dropout(Defense):
    """Drop hidden inputs of linear layers while training, and whole channels after convolutions where conv is set.

    Works on any model; p and conv are chances in [0, 1].
    """

    p: Fraction = 0.3
    conv: Fraction = 0.0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model with dropout inserted."""
        return insert_dropout(model, p=self.p, conv=self.conv)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Return the model without it."""
        return remove_dropout(model)
