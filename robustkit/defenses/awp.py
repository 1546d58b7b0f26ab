"""Perturbed weights: a loss that stays low around the weights generalises, under attack too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.defenses.regularization import weights_of
from robustkit.params import Fraction, PositiveFloat
from robustkit.train.hooks import Batch, Defense, Forward, Step


def weight_perturbation(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """Return gamma * ||w|| / ||g|| * g of each layer's weights w and gradient g, shaped alike (Wu et al. 2020).

    A weight that is exactly 0 is not moved: what was pruned stays pruned. Where the gradient is 0, so is the move.
    """
    moves = []
    for weight, gradient in zip(weights, gradients, strict=True):
        live = gradient * (weight != 0)
        length = torch.linalg.vector_norm(live).clamp_min(torch.finfo(live.dtype).tiny)
        moves.append(live * (gamma * torch.linalg.vector_norm(weight) / length))
    return moves


@contextmanager
def moved_weights(weights: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    """Add the moves to the weights, and put the weights back bit for bit at the end."""
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight.add_(move)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back at the end: an extra forward shall not count in batch norm's statistics."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@dataclass(frozen=True)
class Awp(Defense):
    """Descend from weights moved up the loss, layer by layer: adversarial weight perturbation (Wu et al. 2020).

    gamma is the move's length relative to a layer's weights; start the share of training before the first move. It
    goes with every adversarial training and its loss; the images are not attacked again. Biases, normalization layers
    and weights that are 0 stay. A step costs a forward and a backward more.
    """

    gamma: PositiveFloat = 0.01
    start: Fraction = 0.1

    @contextmanager
    def around_step(self, batch: Batch, forward: Forward, step: Step) -> Iterator[None]:
        """Move the weights up the main loss for this forward and backward, and back before the optimizer's step."""
        weights = [weight for weight in weights_of(step.model) if weight.requires_grad]
        if step.progress < self.start or not weights:
            yield
            return
        with kept_buffers(step.model):
            found = torch.autograd.grad(forward.loss(), weights, allow_unused=True)
        forward.forget()
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        with moved_weights(weights, weight_perturbation(weights, gradients, self.gamma)):
            yield
