"""What the attacks of this package share: restarts, the last stretch, step lengths that fall, the norms they know."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.attacks.minimum_norm.closest import Closest
from robustkit.attacks.minimum_norm.polish import polish
from robustkit.attacks.threat import Norm

Search = Callable[[Closest, Tensor], None]
"""(what was found so far, where to begin (N, ...)): looks around and leaves in the first what it finds."""


def minimise(
    search: Search,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    *,
    restarts: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): the closest images to x (N, ...) that some search found, and how far they are (N,).

    The first search begins at x, each further one at a random image no farther away than what was found, and what is
    found is polished after each: another restart never lengthens a change. x comes back, at an infinite distance, where
    nothing was found.

    Raises:
        AttackError: the model's output has no gradient.
    """
    found = Closest(model, x, y, norm)
    for restart in range(restarts):
        search(found, found.elsewhere(generator) if restart else found.x)
        polish(found)
    return found.best, found.shortest


def falling(first: float, last: float, step: int, steps: int) -> float:
    """Return the length of a step, from `first` down to `last` along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
