"""Which examples of a batch count, by their loss: the hardest ones alone, or all but those."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.params import Fraction, OpenShare
from robustkit.train.hooks import Batch, Defense, Step


def highest(losses: Tensor, share: float) -> Tensor:
    """Return weights (N,) of losses (N,): 1 for the `share` with the highest losses, rounded up, else 0."""
    count = min(len(losses), max(1, math.ceil(share * len(losses) - 1e-9)))
    return torch.zeros_like(losses).scatter(0, losses.topk(count).indices, 1.0)


def lowest(losses: Tensor, drop: float) -> Tensor:
    """Return weights (N,) of losses (N,): 0 for the `drop` with the highest losses, rounded down, else 1."""
    count = min(len(losses) - 1, math.floor(drop * len(losses) + 1e-9))
    return torch.ones_like(losses).scatter(0, losses.topk(count).indices, 0.0)


@dataclass(frozen=True)
class HardExamples(Defense):
    """Train on the examples of each batch with the highest loss alone: online hard examples (Shrivastava et al. 2016).

    keep: their share. The first `warmup` of the training uses every example, as an untrained network's losses say
    nothing. Wrong labels are hard as well: on data that are not clean this makes things worse.
    """

    keep: OpenShare = 0.5
    warmup: Fraction = 0.1

    def loss_weights(self, losses: Tensor, batch: Batch, step: Step) -> Tensor | None:
        """Return 1 for the hard examples and 0 for the others."""
        return highest(losses, self.keep) if step.progress >= self.warmup else None


@dataclass(frozen=True)
class TrimmedLoss(Defense):
    """Drop the examples of each batch with the highest loss: trimmed loss (Shen & Sanghavi 2019), against wrong labels.

    drop: their share. The first `warmup` of the training uses every example: a network learns what is common to
    many before it learns single wrong labels. A backdoor is learnt first, so this does not stop it.
    """

    drop: OpenShare = 0.1
    warmup: Fraction = 0.2

    def loss_weights(self, losses: Tensor, batch: Batch, step: Step) -> Tensor | None:
        """Return 0 for the examples that are dropped and 1 for the others."""
        return lowest(losses, self.drop) if step.progress >= self.warmup else None
