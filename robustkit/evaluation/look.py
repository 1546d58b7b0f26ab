"""The sanity checks before an attack, on what attacks take of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.evaluation.both import checked_view, on_view
from robustkit.evaluation.checks import preflight
from robustkit.models.wrapped import without_gradient
from robustkit.results import Flag

SAME = 8
"""Images on which a view must answer as its model does."""


def looked_at(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int, device: torch.device) -> list[Flag]:
    """Return the flags of a look at a model; of one without gradients, at its surrogate. x (N, ...), y (N,)."""
    if not without_gradient(model):
        return preflight(model, x, y, threat, seed=seed, device=device)
    view = checked_view(model, x[:SAME].to(device))
    return on_view(preflight(view, x, y, threat, seed=seed, device=device), rounded=True)
