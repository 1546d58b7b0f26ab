"""Nearest neighbours in feature space and what their labels say."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1024


def nearest(features: Tensor, k: int) -> Tensor:
    """Return the positions (N, k) of the k nearest other examples by cosine of features (N, D); k < N."""
    unit = F.normalize(features.to(torch.float32), dim=1)
    found = []
    for start in range(0, len(unit), _BLOCK):
        block = unit[start : start + _BLOCK]
        cosine = block @ unit.T
        rows = torch.arange(len(block), device=unit.device)
        cosine[rows, rows + start] = -2.0
        found.append(cosine.topk(k, dim=1).indices)
    return torch.cat(found)


def votes(labels: Tensor, neighbours: Tensor, classes: int) -> Tensor:
    """Return how many of the neighbours (N, k) carry each label, (N, classes) int64."""
    counts = torch.zeros(len(neighbours), classes, dtype=torch.int64, device=labels.device)
    named = labels[neighbours]
    return counts.scatter_add_(1, named, torch.ones_like(named))


def inconsistent(labels: Tensor, counts: Tensor, agreement: float) -> Tensor:
    """Return a bool (N,): another label has more votes than the own one, and at least this share of all votes.

    labels (N,); counts (N, classes) as of `votes`. A tie counts for the own label (deep k-NN, Peri et al. 2019).
    """
    highest = counts.amax(1)
    own = counts.gather(1, labels[:, None]).squeeze(1)
    return (highest > own) & (highest >= agreement * counts.sum(1))


def spare_emptied_classes(labels: Tensor, removed: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return `removed` (N,) without the classes that it would empty, and those classes (C,).

    A class whose every example disagrees with its neighbours is too small for the filter to judge.
    """
    before = torch.bincount(labels, minlength=classes)
    after = torch.bincount(labels[~removed], minlength=classes)
    emptied = (before > 0) & (after == 0)
    return removed & ~emptied[labels], emptied.nonzero().squeeze(1)
