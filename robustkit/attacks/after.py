"""Images that fooled a relative are tried before an attack begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.projection import within
from robustkit.attacks.threat import Attack, Threat


@dataclass(frozen=True)
class After:
    """An attack on the examples that given images (N, ...), put into the ball, do not fool: one forward each.

    Transfer between relatives: Szegedy et al. 2014 (arXiv 1312.6199, section 4.2).
    """

    seeded_by_example: ClassVar[bool] = True

    images: Tensor
    attack: Attack

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the given images where they fool the model, else what the attack found."""
        found = within(x, self.images, threat)
        with torch.no_grad():
            left = survivors(model(found).argmax(1) == y)
        if len(left):
            found[left] = self.attack(model, x[left], y[left], threat.select(left), generator=generator)
        return found
