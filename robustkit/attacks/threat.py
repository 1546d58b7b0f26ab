"""The adversary's budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from robustkit.errors import UsageError

Norm = Literal["linf", "l2", "l1"]


@dataclass(frozen=True)
class Threat:
    """Norm and eps of the adversary. eps is in [0, 1] pixel units: a number, or a tensor (N,) with one per example."""

    norm: Norm
    eps: float | Tensor

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l1"):
            raise UsageError(f"unknown norm {self.norm!r}: use linf, l2 or l1")
        lowest = float(self.eps.min()) if isinstance(self.eps, Tensor) and self.eps.numel() else self.eps
        if not isinstance(lowest, Tensor) and not lowest >= 0:
            raise UsageError(f"eps must not be negative, got {lowest}")
        if self.norm == "linf" and isinstance(self.eps, float | int) and self.eps > 1:
            raise UsageError(f"eps is in [0, 1] pixel units: {self.eps:g} was probably meant as {self.eps:g}/255")

    def eps_for(self, x: Tensor) -> Tensor:
        """Return eps shaped (N, 1, ..., 1) to broadcast over x (N, ...), on x's device and of its dtype."""
        eps = torch.as_tensor(self.eps, device=x.device, dtype=x.dtype)
        return eps.expand(x.shape[0]).view(-1, *[1] * (x.dim() - 1))

    def select(self, index: Tensor) -> Threat:
        """Return the threat of the examples at `index` (a per-example eps is indexed, a number is kept)."""
        return Threat(self.norm, self.eps[index]) if isinstance(self.eps, Tensor) and self.eps.dim() else self


class Attack(Protocol):
    """Parameters at construction; model and budget at call."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return adversarial images for x (N, ...) in [0, 1] with labels y (N,): inside the ball and the box.

        Where nothing better was found, an example comes back as it was. `model` returns logits (N, classes)
        and is in eval mode; the attack leaves it as it found it.
        """
        ...
