"""Random noise of the size of the budget: the control that every real attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.projection import random_extreme, random_start
from robustkit.attacks.threat import Threat
from robustkit.params import PositiveInt


def noise(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, tries: int, generator: torch.Generator) -> Tensor:
    """Return x (N, ...) plus random noise within the ball; of several tries the first that fools each example.

    Every second try is as long as the ball allows: a corner of the linf box, the surface of the l2 or l1 ball. One
    forward a try for each example that is not yet fooled.
    """
    best = x.detach().clone()
    alive = torch.arange(x.shape[0], device=x.device)
    for number in range(tries):
        here = threat.select(alive)
        drawn = (random_extreme if number % 2 else random_start)(x[alive], here, generator)
        with torch.no_grad():
            right = model(drawn).argmax(1) == y[alive]
        best[alive] = drawn
        alive = alive[survivors(right)]
        if not len(alive):
            break
    return best


@dataclass(frozen=True)
class Noise:
    """Random noise of size eps: a control, not an attack."""

    seeded_by_example: ClassVar[bool] = True

    tries: PositiveInt = 10

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return noisy images."""
        return noise(model, x, y, threat, tries=self.tries, generator=generator)
