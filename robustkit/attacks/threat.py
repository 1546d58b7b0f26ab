"""The adversary's budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from robustkit.errors import AttackError, UsageError

Norm = Literal["linf", "l2", "l1", "l0"]
BALLS: tuple[Norm, ...] = ("linf", "l2", "l1")
"""The norms whose balls an image can cross bit by bit; under l0 a value changes or it does not."""


@dataclass(frozen=True)
class Threat:
    """Norm and eps of the adversary. eps is in [0, 1] pixel units: a number, or a tensor (N,) with one per example.

    Under l0 eps is how many values may change, by any amount; a value is one channel of one pixel.
    """

    norm: Norm
    eps: float | Tensor

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l1", "l0"):
            raise UsageError(f"unknown norm {self.norm!r}: use linf, l2, l1 or l0")
        if isinstance(self.eps, Tensor):
            if self.eps.dim() > 1:
                raise UsageError(f"eps is a number or one per example (N,), not {tuple(self.eps.shape)}")
            if self.eps.device.type == "meta" or not self.eps.numel():
                return
            low, high = (float(value) for value in torch.aminmax(self.eps.detach()))
        else:
            low = high = self.eps
        if not (low >= 0 and math.isfinite(high)):
            raise UsageError(f"eps must be a number of at least 0, got {low if math.isfinite(high) else high}")
        if self.norm == "linf" and high > 1:
            raise UsageError(f"eps is in [0, 1] pixel units: {high:g} was probably meant as {high:g}/255")
        if self.norm == "l0" and (low % 1 or high % 1):
            raise UsageError(
                f"eps of l0 is how many values may change, a whole number, not {low if low % 1 else high:g}"
            )

    def eps_for(self, x: Tensor) -> Tensor:
        """Return eps shaped (N, 1, ..., 1) to broadcast over x (N, ...), on x's device and of its dtype."""
        if isinstance(self.eps, Tensor):
            eps = self.eps.to(x.device, x.dtype)
        else:
            # Filled on the device: copying a number over would wait for it.
            eps = torch.full((), self.eps, device=x.device, dtype=x.dtype)
        return eps.expand(x.shape[0]).view(-1, *[1] * (x.dim() - 1))

    def select(self, index: Tensor) -> Threat:
        """Return the threat of the examples at `index` (a per-example eps is indexed, a number is kept)."""
        if not isinstance(self.eps, Tensor) or not self.eps.dim():
            return self
        return self.with_eps(self.eps[index])

    def to(self, device: torch.device) -> Threat:
        """Return the threat with a per-example eps on this device."""
        return self.with_eps(self.eps.to(device)) if isinstance(self.eps, Tensor) else self

    def scaled(self, factor: float) -> Threat:
        """Return the threat with eps times `factor`."""
        return self.with_eps(self.eps * factor)

    def with_eps(self, eps: float | Tensor) -> Threat:
        """Return the threat with another eps, which is not checked."""
        # Not through __init__: checking the values once more would wait for the device at every step of an attack.
        chosen = object.__new__(Threat)
        object.__setattr__(chosen, "norm", self.norm)
        object.__setattr__(chosen, "eps", eps)
        return chosen


def checked_norm(attack: str, threat: Threat, norms: Sequence[Norm]) -> Norm:
    """Return the threat's norm if the attack works under it.

    Raises:
        AttackError: it does not.
    """
    if threat.norm not in norms:
        raise AttackError(f"{attack} works under {' or '.join(norms)}; the threat is {threat.norm}")
    return threat.norm


class Attack(Protocol):
    """Parameters at construction; model and budget at call."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return adversarial images for x (N, ...) in [0, 1] with labels y (N,): inside the ball and the box.

        Where nothing better was found, an example comes back as it was. `model` returns logits (N, classes)
        and is in eval mode; the attack leaves it as it found it.
        """
        ...
