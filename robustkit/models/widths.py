"""Channel widths of layers: what tells a shrunk model from the architecture that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from robustkit.errors import ModelError

ATTRIBUTE = "widths"
"""Where a shrunk model keeps its widths: a copy, a child and its file need them."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Conv2d, nn.Linear, *NORMS)


class Width(BaseModel):
    """Channels that a layer takes and gives; `groups` are those of a convolution."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: int = Field(ge=1)
    outputs: int = Field(ge=1)
    groups: int = Field(default=1, ge=1)


def width_of(module: nn.Module) -> Width:
    """Return the channels of a convolution, a linear layer or a batch norm."""
    if isinstance(module, nn.Conv2d):
        return Width(inputs=module.in_channels, outputs=module.out_channels, groups=module.groups)
    if isinstance(module, nn.Linear):
        return Width(inputs=module.in_features, outputs=module.out_features)
    assert isinstance(module, NORMS)
    return Width(inputs=module.num_features, outputs=module.num_features)


def is_depthwise(module: nn.Module) -> bool:
    """Say whether a layer is a convolution of one input channel an output channel."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.out_channels == module.in_channels


def widths_of(model: nn.Module) -> dict[str, Width]:
    """Return the widths of the layers that are narrower than in the architecture, by name; none unless shrunk."""
    found: dict[str, Width] = getattr(model, ATTRIBUTE, {})
    return dict(found)


def note_widths(model: nn.Module, widths: Mapping[str, Width]) -> None:
    """Note the widths of layers on a model, so that its file tells them."""
    setattr(model, ATTRIBUTE, {**widths_of(model), **widths})


@torch.no_grad()
def narrow(module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Keep these input and output channels of a layer (ascending positions), in place.

    In a grouped convolution each group must keep equally many channels.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, NORMS) or is_depthwise(module):
        _replace(module, lambda value: value[outputs.to(value.device)])
        groups = len(outputs) if is_depthwise(module) else 1
        _set_width(module, Width(inputs=len(outputs), outputs=len(outputs), groups=groups))
        return
    old = width_of(module)
    groups = old.groups
    taken = inputs.view(groups, -1) - torch.arange(groups)[:, None] * (old.inputs // groups)
    rows = outputs.view(groups, -1)
    pieces = [
        weight[row.to(weight.device)][:, column.to(weight.device)] for row, column in zip(rows, taken, strict=True)
    ]
    module.weight = nn.Parameter(torch.cat(pieces), requires_grad=weight.requires_grad)
    if isinstance(module.bias, nn.Parameter):
        bias = module.bias
        module.bias = nn.Parameter(bias[outputs.to(bias.device)].clone(), requires_grad=bias.requires_grad)
    _set_width(module, Width(inputs=len(inputs), outputs=len(outputs), groups=groups))


def apply_widths(model: nn.Module, widths: Mapping[str, Width]) -> None:
    """Give the layers of a model these widths, in place; their values are then without meaning.

    Raises:
        ModelError: a layer that is not there or has no width, or a width that its architecture cannot have.
    """
    layers = dict(model.named_modules())
    for name, width in widths.items():
        module = layers.get(name)
        if not isinstance(module, LAYERS):
            raise ModelError(f"{name} is no convolution, linear layer or batch norm of the architecture")
        _check(name, module, width)
        _resize(module, width)
    note_widths(model, widths)


def _check(name: str, module: nn.Module, width: Width) -> None:
    old = width_of(module)
    if width.inputs > old.inputs or width.outputs > old.outputs:
        raise ModelError(
            f"{name} has {width.inputs} -> {width.outputs} channels, more than the architecture's "
            f"{old.inputs} -> {old.outputs}"
        )
    depthwise = is_depthwise(module)
    if (depthwise or isinstance(module, NORMS)) and width.inputs != width.outputs:
        raise ModelError(f"{name} has {width.inputs} -> {width.outputs} channels; it takes as many as it gives")
    groups = width.outputs if depthwise else old.groups
    if width.groups != groups:
        raise ModelError(f"{name} has {width.groups} groups, the architecture has {groups}")
    if width.inputs % width.groups or width.outputs % width.groups:
        raise ModelError(f"{name}: {width.groups} groups do not divide {width.inputs} -> {width.outputs} channels")


def _resize(module: nn.Module, width: Width) -> None:
    def resized(value: Tensor) -> Tensor:
        if value.dim() < 2:
            return value.new_empty(width.outputs)
        return value.new_empty(width.outputs, width.inputs // width.groups, *value.shape[2:])

    _replace(module, resized)
    _set_width(module, width)


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put changed tensors in the place of a layer's own; single numbers (num_batches_tracked) stay."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(change(parameter.detach()).clone(), requires_grad=parameter.requires_grad))
    for name, value in list(module.named_buffers(recurse=False)):
        if value.dim():
            setattr(module, name, change(value).clone())


def _set_width(module: nn.Module, width: Width) -> None:
    if isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels, module.groups = width.inputs, width.outputs, width.groups
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = width.inputs, width.outputs
    elif isinstance(module, NORMS):
        module.num_features = width.outputs
