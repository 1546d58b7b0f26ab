"""Layers that round their weights and inputs while they are trained, under the names that they had before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustkit.errors import ModelError

AVERAGE = 0.01
"""What each batch adds to the moving range of a layer's inputs, as in Jacob et al. 2018 (arXiv 1712.05877)."""
LEAST_SCALE = 2.0**-12
"""The smallest step of a grid."""
WEIGHT_BITS = 7
"""So many bits weights have at most."""
BITS = "fake_bits"
LOW, HIGH = "input_low", "input_high"
RANGES = "input_ranges"
"""Where a model keeps the ranges of its layers' inputs after the training, by the layers' names."""
Ranges = dict[str, tuple[float, float]]


class _Straight(torch.autograd.Function):
    """The value of one tensor with the gradient of another, unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradient, None


def weight_levels(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest level of a weight: 7 bits where there are 8.

    Kernels for x86 without VNNI add pairs of products in 16 bits, and cut larger sums off: with whole bytes the same
    file would answer otherwise on such a processor.
    """
    half = 2 ** (min(bits, WEIGHT_BITS) - 1)
    return -half, half - 1


def rounded_weight(weight: Tensor, bits: int) -> Tensor:
    """Return weights (outputs, ...) on a symmetric grid an output, with the identity's gradient."""
    low, high = weight_levels(bits)
    detached = weight.detach().float()
    scale = (detached.flatten(1).abs().amax(1) / ((high - low) / 2)).clamp(min=LEAST_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    value = torch.fake_quantize_per_channel_affine(detached, scale, zero, 0, low, high)
    found: Tensor = _Straight.apply(weight, value.to(weight.dtype))
    return found


def rounded_input(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return activations on an affine grid from `low` to `high` (scalars; 0 is on it), with the identity's gradient."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=LEAST_SCALE)
    zero = (-low / scale).round().clamp(0, 2**bits - 1).to(torch.int32)
    value = torch.fake_quantize_per_tensor_affine(x.detach().float(), scale, zero, 0, 2**bits - 1)
    found: Tensor = _Straight.apply(x, value.to(x.dtype))
    return found


class _Fake(nn.Module):
    """What both kinds of layers do to their input."""

    input_low: Tensor
    input_high: Tensor
    fake_bits: int

    def _rounded(self, x: Tensor) -> Tensor:
        if self.training:
            self._watch(x.detach())
        return rounded_input(x, self.input_low, self.input_high, self.fake_bits)

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        low, high = torch.aminmax(x.float())
        # Before the first batch the range is empty.
        first = self.input_low == self.input_high
        self.input_low.copy_(torch.where(first, low, self.input_low + AVERAGE * (low - self.input_low)))
        self.input_high.copy_(torch.where(first, high, self.input_high + AVERAGE * (high - self.input_high)))


class FakeConv2d(_Fake, nn.Conv2d):
    """A convolution of rounded inputs with rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (N, C, H, W)."""
        found: Tensor = self._conv_forward(self._rounded(x), rounded_weight(self.weight, self.fake_bits), self.bias)
        return found


class FakeLinear(_Fake, nn.Linear):
    """A linear layer of rounded inputs with rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x (N, ..., inputs)."""
        return nn.functional.linear(self._rounded(x), rounded_weight(self.weight, self.fake_bits), self.bias)


FAKES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: FakeConv2d, nn.Linear: FakeLinear}
PLAIN = {fake: plain for plain, fake in FAKES.items()}


def put_fakes(model: nn.Module, bits: int) -> nn.Module:
    """Let each convolution and linear layer round its inputs and weights, in place; names and parameters stay.

    Raises:
        ModelError: a layer is parametrized, as by spectral_norm, or the model has none to round.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        raise ModelError("int8: the model has no convolution or linear layer to train with fake quantization")
    for name, module in layers:
        fake = FAKES.get(type(module))
        if fake is None:
            raise ModelError(
                f"int8: {name} is a {type(module).__name__}, which cannot be trained with fake quantization; drop qat, "
                "or what changes the layer, such as spectral_norm"
            )
        # The same object with another forward: optimizers, masks and averages know it by its name and parameters.
        module.__class__ = fake  # type: ignore[assignment]
        setattr(module, BITS, bits)
        for buffer in (LOW, HIGH):
            module.register_buffer(buffer, torch.zeros((), device=module.weight.device))
    return model


def take_fakes(model: nn.Module) -> nn.Module:
    """Make the layers plain again, in place, and note the ranges of their inputs on the model."""
    ranges: Ranges = {}
    for name, module in model.named_modules():
        plain: type[nn.Module] | None = PLAIN.get(type(module))
        if plain is not None:
            ranges[name] = (float(getattr(module, LOW)), float(getattr(module, HIGH)))
            for attribute in (LOW, HIGH, BITS):
                delattr(module, attribute)
            module.__class__ = plain
    setattr(model, RANGES, ranges)
    return model


def ranges_of(model: nn.Module) -> Ranges | None:
    """Return the ranges that a training with fake quantization left; None where there was none."""
    found: Ranges | None = getattr(model, RANGES, None)
    return found
