"""Regularization: penalties on weights, decay and label smoothing. They curb overfitting; alone they stop no attack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.params import Fraction, NonNegativeFloat
from robustkit.train.hooks import Batch, Defense, Forward, Step

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def weights_of(model: nn.Module, *, norms: bool = False, biases: bool = False) -> list[nn.Parameter]:
    """Return the parameters to regularize: weights, and on request those of normalization layers and the biases.

    A parameter of one dimension that belongs to neither (a learned scale) counts as a bias.
    """
    return [parameter for kind, parameter in _kinds(model) if {"norm": norms, "bias": biases}.get(kind, True)]


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            if isinstance(module, _NORMS):
                yield "norm", parameter
            else:
                yield ("bias" if name.endswith("bias") or parameter.dim() <= 1 else "weight"), parameter


def decay_groups(groups: Iterable[dict[str, Any]], decayed: Iterable[Tensor], amount: float) -> list[dict[str, Any]]:
    """Split optimizer groups: `decayed` parameters get weight_decay = amount, the others 0; other settings are kept."""
    chosen = set(decayed)
    split: list[dict[str, Any]] = []
    for group in groups:
        for members, value in (
            ([p for p in group["params"] if p in chosen], amount),
            ([p for p in group["params"] if p not in chosen], 0.0),
        ):
            if members:
                split.append({**group, "params": members, "weight_decay": value})
    return split


def l1_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Return the sum of absolute values of all parameters, a scalar with a graph; at least one is needed."""
    return torch.stack([parameter.abs().sum() for parameter in parameters]).sum()


def elastic_penalty(parameters: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """Return l1 * sum |w| + l2 * sum w^2 over all parameters, a scalar with a graph (Zou & Hastie 2005)."""
    squares = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
    return l1 * l1_penalty(parameters) + l2 * squares


def orthogonal_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Return the sum of ||G - I||_F^2 over all weights, a scalar with a graph (Bansal et al. 2018).

    A weight is taken as a matrix W (outputs, everything else); G is W W^T, or W^T W where it has more rows than
    columns, as only the smaller of the two can become the identity.
    """
    gaps = []
    for parameter in parameters:
        with _full_precision(parameter.device.type):
            matrix = parameter.flatten(1).float()
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
            gram = matrix @ matrix.t()
            gaps.append((gram - torch.eye(gram.shape[0], device=gram.device)).square().sum())
    return torch.stack(gaps).sum()


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Return where autocast is off: a small difference to the identity is lost in half precision."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def smooth_labels(target: Tensor, amount: float) -> Tensor:
    """Return (1 - amount) * target + amount / classes for probabilities (N, classes) (Szegedy et al. 2016)."""
    return target * (1 - amount) + amount / target.shape[1]


@dataclass(frozen=True)
class WeightDecay(Defense):
    """Decay the weights towards 0; normalization layers and biases stay out unless asked.

    It takes the place of the optimizer's own weight_decay.
    """

    amount: NonNegativeFloat = 5e-4
    norms: bool = False
    biases: bool = False

    def parameter_groups(self, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups split into decayed and not decayed parameters."""
        return decay_groups(groups, weights_of(model, norms=self.norms, biases=self.biases), self.amount)


@dataclass(frozen=True)
class L1(Defense):
    """Add amount times the sum of absolute weights to the loss.

    Normalization layers and biases stay out unless asked.
    """

    amount: NonNegativeFloat = 1e-6
    norms: bool = False
    biases: bool = False

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """Return the scalar penalty; None for a model without weights."""
        weights = weights_of(step.model, norms=self.norms, biases=self.biases)
        return self.amount * l1_penalty(weights) if weights else None


@dataclass(frozen=True)
class Elastic(Defense):
    """Add the elastic net to the loss: l1 times the absolute weights plus l2 times their squares (Zou & Hastie 2005).

    Normalization layers and biases stay out unless asked.
    """

    l1: NonNegativeFloat = 1e-6
    l2: NonNegativeFloat = 1e-4
    norms: bool = False
    biases: bool = False

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """Return the scalar penalty; None for a model without weights."""
        weights = weights_of(step.model, norms=self.norms, biases=self.biases)
        return elastic_penalty(weights, self.l1, self.l2) if weights else None


@dataclass(frozen=True)
class Orthogonal(Defense):
    """Draw the filters of every layer towards orthonormal ones: soft orthogonality (Bansal et al. 2018).

    amount weighs the sum of ||W W^T - I||_F^2 over convolutions and linear layers.
    """

    amount: NonNegativeFloat = 1e-3

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """Return the scalar penalty; None for a model without weights."""
        weights = weights_of(step.model)
        return self.amount * orthogonal_penalty(weights) if weights else None


@dataclass(frozen=True)
class LabelSmoothing(Defense):
    """Mix the targets with the uniform distribution (Szegedy et al. 2016)."""

    amount: Fraction = 0.1

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Return the batch with soft targets; targets that are soft already (mixup) are smoothed further."""
        return replace(batch, target=smooth_labels(batch.soft_target(), self.amount))
