"""Operations of ONNX (opset 13 to 23) in PyTorch, as far as image classifiers have them; each is differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.errors import ModelError

Given = Mapping[str, Any]
"""Attributes of a node by name."""
Inputs = Sequence[Tensor | None]
Operation = Callable[[Given, Inputs], Tensor]


class _RoundTrip(torch.autograd.Function):
    """To the grid of bytes and back; on the way back the identity, also where values were clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:  # noqa: ANN401
        return ((x / scale).round().add_(zero).clamp_(low, high) - zero) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        return gradient, None, None, None, None


RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def quantize(given: Given, inputs: Inputs) -> Tensor:
    """Return x rounded to the grid of its scale and zero point, as floats; the gradient is the identity.

    Straight-through also where values are clipped (Bengio et al. 2013, arXiv 1308.3432; Athalye et al. 2018, arXiv
    1802.00420, section 4.1).
    """
    x, scale, zero = need(inputs, 3)
    if zero.dtype not in RANGES or scale.numel() > 1:
        raise ModelError("activations are quantized to int8 or uint8 with one scale, or not at all")
    low, high = RANGES[zero.dtype]
    rounded: Tensor = _RoundTrip.apply(x, scale, zero.to(x.dtype), low, high)
    return rounded


def dequantize(given: Given, inputs: Inputs) -> Tensor:
    """Return integers as the floats that they stand for; what `quantize` returned is that already."""
    x, scale = need(inputs, 2)
    if x.is_floating_point():
        return x
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else torch.zeros_like(scale, dtype=x.dtype)
    if scale.numel() > 1:
        along = [1] * x.dim()
        along[given.get("axis", 1)] = -1
        scale, zero = scale.view(along), zero.view(along)
    return (x.to(scale.dtype) - zero.to(scale.dtype)) * scale


def need(inputs: Inputs, count: int) -> list[Tensor]:
    """Return the first inputs, all of which must be there."""
    found = [one for one in inputs[:count] if one is not None]
    if len(found) < count:
        raise ModelError("an operation of the ONNX file lacks an input")
    return found


def _optional(inputs: Inputs, place: int) -> Tensor | None:
    return inputs[place] if len(inputs) > place else None


def _sides(given: Given, dims: int) -> tuple[list[int], list[int]]:
    """Return (padding at the start, at the end) of each spatial dimension."""
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError("the ONNX file pads automatically; export it with explicit padding")
    pads = list(given.get("pads", [0] * 2 * dims))
    return pads[:dims], pads[dims:]


def _even(given: Given, dims: int, what: str) -> list[int]:
    start, end = _sides(given, dims)
    if start != end:
        raise ModelError(f"{what} with uneven padding")
    return start


def _conv(given: Given, inputs: Inputs) -> Tensor:
    x, weight = need(inputs, 2)
    dims = weight.dim() - 2
    start, end = _sides(given, dims)
    padding = start
    if start != end:
        x = functional.pad(x, [side for pair in zip(reversed(start), reversed(end), strict=True) for side in pair])
        padding = [0] * dims
    if dims != 2:
        raise ModelError(f"a convolution over {dims} dimensions")
    return functional.conv2d(
        x,
        weight,
        _optional(inputs, 2),
        stride=given.get("strides", [1, 1]),
        padding=padding,
        dilation=given.get("dilations", [1, 1]),
        groups=given.get("group", 1),
    )


def _gemm(given: Given, inputs: Inputs) -> Tensor:
    a, b = need(inputs, 2)
    a = a.t() if given.get("transA", 0) else a
    b = b.t() if given.get("transB", 0) else b
    found: Tensor = given.get("alpha", 1.0) * (a @ b)
    bias = _optional(inputs, 2)
    if bias is not None:
        found = found + given.get("beta", 1.0) * bias
    return found


def _batch_norm(given: Given, inputs: Inputs) -> Tensor:
    x, weight, bias, mean, var = need(inputs, 5)
    return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, given.get("epsilon", 1e-5))


def _max_pool(given: Given, inputs: Inputs) -> Tensor:
    (x,) = need(inputs, 1)
    found: Tensor = functional.max_pool2d(
        x,
        given["kernel_shape"],
        stride=given.get("strides", [1, 1]),
        padding=_even(given, 2, "a pooling"),
        dilation=given.get("dilations", [1, 1]),
        ceil_mode=bool(given.get("ceil_mode", 0)),
    )
    return found


def _average_pool(given: Given, inputs: Inputs) -> Tensor:
    (x,) = need(inputs, 1)
    return functional.avg_pool2d(
        x,
        given["kernel_shape"],
        stride=given.get("strides", [1, 1]),
        padding=_even(given, 2, "a pooling"),
        ceil_mode=bool(given.get("ceil_mode", 0)),
        count_include_pad=bool(given.get("count_include_pad", 0)),
    )


def _axes(given: Given, inputs: Inputs, x: Tensor) -> list[int]:
    named = _optional(inputs, 1)
    axes = [int(one) for one in named.tolist()] if named is not None else list(given.get("axes", []))
    return axes or list(range(x.dim()))


def _reduce(how: Callable[..., Tensor]) -> Operation:
    def run(given: Given, inputs: Inputs) -> Tensor:
        (x,) = need(inputs, 1)
        return how(x, dim=_axes(given, inputs, x), keepdim=bool(given.get("keepdims", 1)))

    return run


def _reshape(given: Given, inputs: Inputs) -> Tensor:
    x, shape = need(inputs, 2)
    sizes = [int(one) for one in shape.tolist()]
    if not given.get("allowzero", 0):
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(given: Given, inputs: Inputs) -> Tensor:
    (x,) = need(inputs, 1)
    return x.reshape(math.prod(x.shape[: given.get("axis", 1)]), -1)


def _clip(given: Given, inputs: Inputs) -> Tensor:
    (x,) = need(inputs, 1)
    low, high = _optional(inputs, 1), _optional(inputs, 2)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _unary(how: Callable[[Tensor], Tensor]) -> Operation:
    return lambda given, inputs: how(need(inputs, 1)[0])


def _binary(how: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda given, inputs: how(*need(inputs, 2))


def _gelu(given: Given, inputs: Inputs) -> Tensor:
    return functional.gelu(need(inputs, 1)[0], approximate=given.get("approximate", b"none").decode())


def _hard_sigmoid(given: Given, inputs: Inputs) -> Tensor:
    (x,) = need(inputs, 1)
    return torch.clamp(given.get("alpha", 0.2) * x + given.get("beta", 0.5), 0, 1)


OPERATIONS: Mapping[str, Operation] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _binary(torch.matmul),
    "BatchNormalization": _batch_norm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _unary(lambda x: x.mean((2, 3), keepdim=True)),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMax": _reduce(torch.amax),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": lambda given, inputs: need(inputs, 1)[0].permute(given["perm"]),
    "Concat": lambda given, inputs: torch.cat(need(inputs, len(inputs)), given["axis"]),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Clip": _clip,
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Erf": _unary(torch.erf),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "LeakyRelu": lambda given, inputs: functional.leaky_relu(need(inputs, 1)[0], given.get("alpha", 0.01)),
    "Softmax": lambda given, inputs: need(inputs, 1)[0].softmax(given.get("axis", -1)),
    "LogSoftmax": lambda given, inputs: need(inputs, 1)[0].log_softmax(given.get("axis", -1)),
    "Identity": _unary(lambda x: x),
}
