"""Projection onto the adversary's ball and onto the image box, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.threat import Threat
from robustkit.errors import UsageError


def project_(delta: Tensor, threat: Threat) -> Tensor:
    """Project delta (N, ...) onto the threat's linf or l2 ball in place, each example by itself, and return it."""
    eps = threat.eps_for(delta)
    if threat.norm == "linf":
        return torch.clamp(delta, -eps, eps, out=delta)
    if threat.norm == "l2":
        # A shrunk example keeps its direction; the tiny floor only avoids 0/0 for delta == 0.
        return delta.mul_((eps / l2_norm(delta)).clamp(max=1.0))
    raise UsageError(f"there is no projection onto the {threat.norm} ball: use linf or l2")


def l2_norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each example of x (N, ...), shaped (N, 1, ..., 1) and never below 1e-12."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1e-12)
    return norm.view(-1, *[1] * (x.dim() - 1))
