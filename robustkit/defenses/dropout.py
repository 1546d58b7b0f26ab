"""Dropout by surgery: put into any model for the training, taken out again before the model is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from robustkit.defenses.surgery import attach, attached, detach, leaves
from robustkit.errors import UsageError
from robustkit.params import Fraction
from robustkit.train.hooks import Defense

KIND = "dropout"
KIND_2D = "dropout2d"
KIND_SAMPLED = "mc_dropout"


def insert_dropout(model: nn.Module, *, p: float, conv: float = 0.0) -> nn.Module:
    """Insert dropout into the model in place and return it (Srivastava et al. 2014; Tompson et al. 2015).

    p: chance that a hidden input of a linear layer is dropped. conv: chance that a whole channel is dropped after a
    convolution, behind the batch norm where one follows it. The input image itself is never dropped. No parameter
    name and no key of the state_dict changes; in eval mode the model computes exactly what it did.
    Raises UsageError where the model has no such place, or has inserted dropout already.
    """
    if attached(model, KIND):
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
        attach(module, nn.Dropout(p), KIND, before=True)
    for module in convolutions if conv > 0 else ():
        attach(module, nn.Dropout2d(conv), KIND)
    return model


def remove_dropout(model: nn.Module) -> nn.Module:
    """Take out what insert_dropout put in (also from a deepcopy of that model) and return the model."""
    return detach(model, KIND)


def insert_dropout2d(model: nn.Module, *, p: float) -> nn.Module:
    """Insert dropout of whole channels after every convolution, in place, and return the model (Tompson et al. 2015).

    p: chance that a channel is dropped; the place is behind the batch norm where one follows the convolution.
    Raises UsageError where the model has no convolution, or has inserted dropout2d already.
    """
    if attached(model, KIND_2D):
        raise UsageError("dropout2d was inserted into this model already: use it once")
    _, convolutions = places(model)
    if not convolutions:
        raise UsageError("dropout2d: this model has no convolution")
    for module in convolutions:
        attach(module, nn.Dropout2d(p), KIND_2D)
    return model


def attach_dropout(model: nn.Module, layer: Callable[[int], nn.Module]) -> nn.Module:
    """Put `layer(number)` before each linear layer with hidden inputs, in place, and return the model.

    Raises UsageError where the model has no such layer.
    """
    linears, _ = places(model)
    if not linears:
        raise UsageError("mc_dropout finds no linear layer with hidden inputs in this model: choose another defense")
    for number, module in enumerate(linears):
        attach(module, layer(number), KIND_SAMPLED, before=True)
    return model


def places(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the linear layers with hidden inputs, and the modules after which a convolution's output is final."""
    own = list(leaves(model))
    parametrised = [module for module in own if next(module.parameters(), None) is not None]
    # The first layer with parameters sees the image itself.
    linears: list[nn.Module] = [
        module
        for module in parametrised[1:]
        # Attention reads this layer's weights without calling it.
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    ]
    outputs: list[nn.Module] = []
    for position, module in enumerate(own):
        if isinstance(module, nn.Conv2d):
            after = own[position + 1] if position + 1 < len(own) else None
            follows = isinstance(after, nn.BatchNorm2d) and after.num_features == module.out_channels
            outputs.append(after if follows and after is not None else module)
    return linears, outputs


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


@dataclass(frozen=True)
class Dropout2d(Defense):
    """Drop whole channels after every convolution while training (Tompson et al. 2015).

    p is the chance of a channel, in [0, 1]. The same as `dropout: {p: 0, conv: p}`; it may stand beside `dropout`.
    """

    p: Fraction = 0.1

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model with dropout2d inserted."""
        return insert_dropout2d(model, p=self.p)

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Return the model without it."""
        return detach(model, KIND_2D)
