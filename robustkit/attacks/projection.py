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


def random_start(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return x (N, ...) plus a uniform draw from the threat's linf or l2 ball, kept in [0, 1]."""
    if threat.norm == "linf":
        delta = torch.empty_like(x).uniform_(-1, 1, generator=generator) * threat.eps_for(x)
    else:
        direction = torch.empty_like(x).normal_(generator=generator)
        # The radius of a uniform point of a d-dimensional ball is distributed as U**(1/d).
        share = torch.empty_like(threat.eps_for(x), memory_format=torch.contiguous_format).uniform_(generator=generator)
        radius = threat.eps_for(x) * share.pow(1 / max(1, x[0].numel() if len(x) else 1))
        delta = direction / l2_norm(direction) * radius
    return (x + project_(delta, threat)).clamp(0, 1)
