"""A quick input gradient for a first convolution that has few input channels, which oneDNN computes as if it had 16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.defenses.folding import Convolution

CHANNELS = 4
"""Images of at most so many channels are thin."""
CHUNK = 2**19
"""Numbers that a chunk of the matrix product may have: they are read again while they are in the cache."""


def thin_input_gradient(gradient: Tensor, weight: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the gradient (N, C, *size) of a convolution of stride 1 with respect to its input.

    gradient (N, O, h, w) is that of its output, weight (O, C, kh, kw) its filters, padding the zeros at each side.
    One matrix product gives what each tap of the filter sends back; the taps are added up where they belong.
    """
    count, outputs, height, width = gradient.shape
    _, channels, rows, columns = weight.shape
    taps = weight.permute(2, 3, 1, 0).reshape(-1, outputs)
    top, left = padding
    out = gradient.new_zeros(channels, count, size[0] + 2 * top, size[1] + 2 * left)
    pixels = gradient.permute(0, 2, 3, 1)
    chunk = max(1, CHUNK // (len(taps) * height * width))
    for first in range(0, count, chunk):
        part = pixels[first : first + chunk]
        sent = (taps @ part.reshape(-1, outputs).t()).view(rows, columns, channels, len(part), height, width)
        here = out[:, first : first + chunk]
        for row in range(rows):
            for column in range(columns):
                here[:, :, row : row + height, column : column + width].add_(sent[row, column])
    return out[:, :, top : top + size[0], left : left + size[1]].transpose(0, 1)


class _ThinConvolution(torch.autograd.Function):
    """A convolution with frozen filters whose input gradient is `thin_input_gradient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight)
        ctx.padding, ctx.size = padding, tuple(x.shape[2:])
        ctx.layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
        return functional.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        found = thin_input_gradient(gradients[0], weight, ctx.padding, ctx.size)
        return found.contiguous(memory_format=ctx.layout or torch.contiguous_format), None, None, None


def is_thin(call: Convolution) -> bool:
    """Say whether `thin_convolution` is for this one: stride 1, no dilation, one group, on the CPU, no autocast."""
    x = call.x
    if x.device.type != "cpu" or not x.requires_grad or x.dim() != 4 or x.shape[1] > CHANNELS or call.groups != 1:
        return False
    if torch.is_autocast_enabled("cpu") or isinstance(call.padding, str):
        return False
    return _pair(call.stride) == (1, 1) and _pair(call.dilation) == (1, 1)


def thin_convolution(call: Convolution) -> Tensor:
    """Return what torch computes, to the bit; its input gradient is `thin_input_gradient`."""
    found: Tensor = _ThinConvolution.apply(call.x, call.weight, call.bias, _pair(call.padding))
    return found


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return both[0], both[-1]
