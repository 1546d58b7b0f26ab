"""Intervals of tensors, and what each layer does to them (Gowal et al. 2018, arXiv 1810.12715, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Map = Callable[[Tensor], Tensor]


class NoBounds(Exception):
    """A layer or a function whose bounds are not known; the message says what it is."""


@dataclass(frozen=True)
class Box:
    """All tensors between `lower` and `upper`, entry by entry; both have the same shape."""

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        """The middle of the box."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half of the box's width, from 0."""
        return (self.upper - self.lower) / 2

    def monotone(self, function: Map) -> Box:
        """Return the image under a function that never falls in any entry: exact."""
        return Box(function(self.lower), function(self.upper))

    def affine(self, linear: Map, absolute: Map) -> Box:
        """Return bounds of an affine map; `absolute`: the same map without its shift, its weights without signs."""
        middle, spread = linear(self.centre), absolute(self.radius)
        return Box(middle - spread, middle + spread)

    def dip(self, function: Map, lowest: float) -> Box:
        """Return the image under a function of each entry that falls up to `lowest` and rises from there: exact."""
        low, high = function(self.lower), function(self.upper)
        floor = function(torch.full((), lowest, dtype=self.lower.dtype, device=self.lower.device))
        inside = (self.lower <= lowest) & (self.upper >= lowest)
        return Box(torch.where(inside, floor, torch.minimum(low, high)), torch.maximum(low, high))


def plus(one: Box | Tensor | float, other: Box | Tensor | float) -> Box:
    """Return bounds of a sum of which one side at least is a box."""
    first, second = _boxes(one, other)
    return Box(first.lower + second.lower, first.upper + second.upper)


def minus(one: Box | Tensor | float, other: Box | Tensor | float) -> Box:
    """Return bounds of a difference of which one side at least is a box."""
    first, second = _boxes(one, other)
    return Box(first.lower - second.upper, first.upper - second.lower)


def times(one: Box | Tensor | float, other: Box | Tensor | float) -> Box:
    """Return bounds of a product of which one side at least is a box: exact where only one is."""
    first, second = _boxes(one, other)
    corners = [left * right for left in (first.lower, first.upper) for right in (second.lower, second.upper)]
    low, high = (torch.stack(corners).amin(0), torch.stack(corners).amax(0))
    return Box(low, high)


def over(box: Box, divisor: Tensor | float) -> Box:
    """Return bounds of a box divided by constants; division by 0 gives infinite bounds or none at all (NaN)."""
    _, constant = _boxes(box, divisor)
    first, second = box.lower / constant.lower, box.upper / constant.lower
    return Box(torch.minimum(first, second), torch.maximum(first, second))


def _boxes(one: Box | Tensor | float, other: Box | Tensor | float) -> tuple[Box, Box]:
    """Return both sides as boxes; a constant is a box of width 0."""
    like = one.lower if isinstance(one, Box) else other.lower if isinstance(other, Box) else torch.zeros(())

    def boxed(value: Box | Tensor | float) -> Box:
        if isinstance(value, Box):
            return value
        constant = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return Box(constant, constant)

    return boxed(one), boxed(other)


LOWEST: Mapping[str, float] = {
    "gelu": -0.7517915246935645,
    "gelu tanh": -0.7524614220710162,
    "silu": -1.278464542761074,
    "mish": -1.1924312145154952,
    "hardswish": -1.5,
}
"""Where each of these activations has its one minimum."""
MONOTONE_LAYERS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softsign,
    nn.SELU,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Flatten, nn.Unflatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.PixelShuffle, nn.ChannelShuffle,
)  # fmt: skip
DIPS: Mapping[type[nn.Module], str] = {
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
}


def through_layer(layer: nn.Module, box: Box) -> Box:
    """Return bounds of a layer in eval mode: exact for each entry by itself.

    Raises:
        NoBounds: the layer is not one of those whose bounds are known.
    """
    if isinstance(layer, nn.Linear) and _is(layer, nn.Linear):
        weight, bias = layer.weight.to(box.lower.dtype), _to(layer.bias, box)
        functional = nn.functional.linear
        return box.affine(lambda x: functional(x, weight, bias), lambda x: functional(x, weight.abs()))
    if isinstance(layer, _ConvNd) and any(_is(layer, one) for one in (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(layer, box)
    if isinstance(layer, _NormBase) and any(
        _is(layer, one) for one in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    ):
        return _batch_norm(layer, box)
    for kind, name in DIPS.items():
        if _is(layer, kind):
            return box.dip(layer, LOWEST["gelu tanh" if getattr(layer, "approximate", "") == "tanh" else name])
    rising = (isinstance(layer, nn.LeakyReLU) and layer.negative_slope >= 0 and _is(layer, nn.LeakyReLU)) or (
        isinstance(layer, nn.ELU | nn.CELU) and layer.alpha >= 0 and (_is(layer, nn.ELU) or _is(layer, nn.CELU))
    )
    if rising or any(_is(layer, kind) for kind in MONOTONE_LAYERS):
        if layer.training and isinstance(layer, nn.modules.dropout._DropoutNd):
            raise NoBounds("a dropout in training mode")
        return box.monotone(layer)
    raise NoBounds(type(layer).__name__)


def _is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a layer computes what this class of torch does: the class itself, or one that only adds to it."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _to(value: Tensor | None, box: Box) -> Tensor | None:
    return None if value is None else value.to(box.lower.dtype)


def _convolution(layer: _ConvNd, box: Box) -> Box:
    weight, bias = layer.weight.to(box.lower.dtype), _to(layer.bias, box)
    forward = layer._conv_forward
    # Padding, whatever its mode, is the same linear map for the centre and for the radius.
    return box.affine(lambda x: forward(x, weight, bias), lambda x: forward(x, weight.abs(), None))


def _batch_norm(layer: _NormBase, box: Box) -> Box:
    mean, variance = layer.running_mean, layer.running_var
    if layer.training or mean is None or variance is None:
        raise NoBounds(f"{type(layer).__name__} with the statistics of the batch")
    scale = (variance.to(box.lower.dtype) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.to(box.lower.dtype)
    shift = -mean.to(box.lower.dtype) * scale
    if layer.bias is not None:
        shift = shift + layer.bias.to(box.lower.dtype)
    shape = (1, -1, *[1] * (box.lower.dim() - 2))
    factor, offset = scale.view(shape), shift.view(shape)
    return box.affine(lambda x: x * factor + offset, lambda x: x * factor.abs())
