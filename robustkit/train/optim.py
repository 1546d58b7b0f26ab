"""Optimizers and learning-rate schedules as plugins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from robustkit.params import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

Groups = list[dict[str, Any]]


class OptimizerPlugin(Protocol):
    """Makes an optimizer; `lr` is the peak that the schedule scales."""

    lr: float

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """Return the optimizer of these parameter groups."""
        ...


class SchedulePlugin(Protocol):
    """A learning rate as a function of the share of training that is done, so that a resume needs no state."""

    def factor(self, progress: float, epoch: int) -> float:
        """Return what the peak learning rate is multiplied with; progress in [0, 1], epoch from 0."""
        ...


FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch updates all parameters in one call."""


def fusible(groups: Groups) -> bool:
    """Say whether all parameters of the groups can be updated in one call."""
    parameters = [one for group in groups for one in group["params"]]
    kinds = {one.device.type for one in parameters}
    return len(kinds) == 1 and kinds <= set(FUSED) and all(one.is_floating_point() for one in parameters)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum."""

    lr: PositiveFloat = 0.1
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 0.0
    nesterov: bool = False

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """Return torch's SGD."""
        optimizer = torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
            fused=fusible(groups),
        )
        if self.momentum > 0:
            # The fused update fails where some parameters, frozen until now, have no momentum yet and others have.
            for parameter in (one for group in optimizer.param_groups for one in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980)."""

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """Return torch's Adam."""
        return torch.optim.Adam(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fusible(groups))


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """Return torch's AdamW."""
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fusible(groups))


@dataclass(frozen=True)
class OneCycle:
    """Linear warm-up to the peak, then linear to a small share of it (Smith & Topin 2018, arXiv 1708.07120)."""

    warm_up: Fraction = 0.25
    start: Fraction = 0.1
    final: Fraction = 0.02

    def factor(self, progress: float, epoch: int) -> float:
        """Return the triangle's height."""
        if progress < self.warm_up:
            return self.start + (1 - self.start) * progress / self.warm_up
        left = (1 - progress) / max(1 - self.warm_up, 1e-9)
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to zero (Loshchilov & Hutter 2017, arXiv 1608.03983), after a linear warm-up."""

    warm_up: Fraction = 0.0

    def factor(self, progress: float, epoch: int) -> float:
        """Return the cosine's height."""
        if progress < self.warm_up:
            return max(progress / self.warm_up, 1e-3)
        done = (progress - self.warm_up) / max(1 - self.warm_up, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class StepDecay:
    """The peak, multiplied by `gamma` after every `every` epochs."""

    every: PositiveInt = 30
    gamma: Fraction = 0.1

    def factor(self, progress: float, epoch: int) -> float:
        """Return gamma to the power of the drops so far."""
        return float(self.gamma ** (epoch // self.every))


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout."""

    def factor(self, progress: float, epoch: int) -> float:
        """Return 1."""
        return 1.0
