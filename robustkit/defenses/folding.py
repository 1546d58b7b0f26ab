"""Batch norms in eval mode, folded into the frozen convolutions before them (Jacob et al. 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from robustkit.nested import tensors_in

SHAPES = frozenset({Tensor.dim, Tensor.size, Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__})  # type: ignore[attr-defined]
"""What only looks at what kind of tensor it gets."""


class Convolution(NamedTuple):
    """The arguments of `torch.conv2d`, with filters (O, C, h, w) and a bias (O,) that take no gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    def plain(self) -> Tensor:
        """Return what torch computes."""
        return torch.conv2d(*self)


class Norm(NamedTuple):
    """The statistics (O,), scales and shifts (O,) of a batch norm in eval mode; none of them takes a gradient."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def as_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,  # noqa: ANN401
    padding: Any = 0,  # noqa: ANN401
    dilation: Any = 1,  # noqa: ANN401
    groups: int = 1,
) -> Convolution | None:
    """Return the arguments of `torch.conv2d` where its filters are frozen, else None."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return Convolution(x, weight, bias, stride, padding, dilation, groups)


def as_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm | None:
    """Return the arguments of `functional.batch_norm` where it is in eval mode and frozen, else None."""
    if training or running_mean is None or running_var is None:
        return None
    if any(one is not None and one.requires_grad for one in (weight, bias)):
        return None
    return Norm(running_mean, running_var, weight, bias, eps)


@dataclass
class _Pair:
    """A convolution and the batch norm that alone takes what it returns."""

    call: Convolution
    norm: Norm
    versions: list[int]
    """How often its tensors had been changed in place."""
    fused: tuple[Tensor, Tensor] | None = None
    """Filters and bias with the batch norm in them, from their first use on; in lower precision where autocast is on,
    which would cast them anew in each pass, as they take no gradient."""

    def folded(self, call: Convolution) -> Convolution | None:
        """Return a call of the convolution with the batch norm in it; None where the tensors have changed."""
        if self.versions != _versions(self.call, self.norm):
            return None
        dtype = _computed_in(call.weight)
        if self.fused is None or self.fused[0].dtype != dtype:
            first, norm = self.call, self.norm
            weight, bias = fuse_conv_bn_weights(
                first.weight, first.bias, norm.mean, norm.var, norm.eps, norm.weight, norm.bias
            )
            self.fused = weight.detach().to(dtype), bias.detach().to(dtype)
        return call._replace(weight=self.fused[0], bias=self.fused[1])


@dataclass
class _Output:
    """What a convolution returned in this pass, and where it went."""

    tensor: Tensor
    call: Convolution
    """Without the images."""
    pair: _Pair | None
    """Where its batch norm is in it already."""
    norm: Norm | None = None


class Folding:
    """Watches the first pass of a model, and folds in those after it.

    A batch norm is folded into a convolution that was called once, if no other torch function took its output. A pass
    that goes another way than the first is not to be used: `ended_well` says so. A hook that only keeps what a
    convolution returns is not seen: it gets the batch norm's output.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, _Pair] | None = None
        self._outputs: dict[int, _Output] = {}
        self._spoiled: list[Convolution] = []
        """Calls of the first pass whose outputs went elsewhere; these are not kept."""
        self._astray = False

    def watched(self, call: Convolution, run: Callable[[Convolution], Tensor]) -> Tensor:
        """Return the output of a convolution, of one with a batch norm folded in where there is one."""
        pair = None if self._pairs is None else self._pairs.get(id(call.weight))
        folded = None if pair is None else pair.folded(call)
        found = run(folded or call)
        if folded or self._pairs is None:
            # The output is kept until the pass ends, so that no other tensor gets its id.
            self._outputs[id(found)] = _Output(found, call._replace(x=torch.empty(0)), pair)
        return found

    def takes(self, x: Tensor, norm: Norm) -> bool:
        """Say whether x is an output with this batch norm in it already; note where it goes."""
        output = self._outputs.get(id(x))
        if output is None:
            return False
        if output.pair is not None:
            del self._outputs[id(x)]
            self._astray |= not _same(output.pair.norm, norm)
            return True
        if output.norm is not None:
            self._spoil(output)
        output.norm = norm
        return False

    def look_at(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which outputs another operation than a batch norm in eval mode takes."""
        if not self._outputs or func in SHAPES:
            return
        for tensor in tensors_in([*args, *kwargs.values()]):
            output = self._outputs.get(id(tensor))
            if output is not None:
                self._astray |= output.pair is not None
                self._spoil(output)

    def _spoil(self, output: _Output) -> None:
        self._spoiled.append(output.call)
        del self._outputs[id(output.tensor)]

    def ended_well(self) -> bool:
        """End a pass; say whether its output can be used."""
        if self._pairs is None:
            self._pairs = _pairs(list(self._outputs.values()), self._spoiled)
        else:
            self._astray |= bool(self._outputs)
        self._outputs, self._spoiled = {}, []
        return not self._astray


def _pairs(outputs: list[_Output], spoiled: list[Convolution]) -> dict[int, _Pair]:
    """Return the pairs of a pass, by the ids of their filters."""
    calls = [id(call.weight) for call in [*spoiled, *(output.call for output in outputs)]]
    found: dict[int, _Pair] = {}
    for output in outputs:
        call, norm = output.call, output.norm
        alone = calls.count(id(call.weight)) == 1
        # Filters that are no parameter are computed anew for each pass; inference tensors do not count their changes.
        lasting = type(call.weight) is nn.Parameter and not any(one.is_inference() for one in tensors_in([*call, norm]))
        if norm is not None and alone and lasting:
            found[id(call.weight)] = _Pair(call, norm, _versions(call, norm))
    return found


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the type in which a convolution with such filters is computed; autocast leaves float64 alone."""
    device = weight.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast and weight.dtype != torch.float64 else weight.dtype


def _versions(call: Convolution, norm: Norm) -> list[int]:
    return [one._version for one in tensors_in([*call, norm])]


def _same(one: Norm, other: Norm) -> bool:
    return one.eps == other.eps and all(first is second for first, second in zip(one[:-1], other[:-1], strict=True))
