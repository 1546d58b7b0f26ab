"""Sharpness-aware minimisation: the gradient is taken where the loss nearby is highest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.params import PositiveFloat
from robustkit.train.hooks import Defense, Step


@torch.no_grad()
def ascent(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Return rho * gradient / ||all gradients||_2, shaped like the parameters (Foret et al. 2021, equation 2).

    A weight of a convolution or linear layer that is exactly zero was pruned: it is not moved and does not count.
    """
    free = [
        gradient * (parameter != 0) if parameter.dim() > 1 else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    norm = torch.stack([gradient.float().square().sum() for gradient in free]).sum().sqrt()
    scale = rho / norm.clamp(min=1e-12)
    return [gradient * scale.to(gradient.dtype) for gradient in free]


@contextmanager
def moved(parameters: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Add `by` to the parameters, and put back exactly what they were, also on an error."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, change in zip(parameters, by, strict=True):
                parameter.add_(change)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics: each batch is to count once, at the real weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracked in kept:
            norm.track_running_stats = tracked


@contextmanager
def _uphill(model: nn.Module, rho: float) -> Iterator[None]:
    parameters, gradients = [], []
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameters.append(parameter)
            gradients.append(parameter.grad)
    with moved(parameters, ascent(parameters, gradients, rho)), still_statistics(model):
        yield


@dataclass(frozen=True)
class Sam(Defense):
    """Step by the gradient at the worst weights within rho: sharpness-aware minimisation (Foret et al. 2021).

    rho is the l2 distance over all weights. A step costs a second forward and backward; adversarial images are not
    searched anew. Batch norms see each batch once.
    """

    rho: PositiveFloat = 0.05

    def second_pass(self, step: Step) -> AbstractContextManager[None]:
        """Return the context in which the weights are uphill."""
        return _uphill(step.model, self.rho)
