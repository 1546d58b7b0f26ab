"""E9: adversarial images that an attack met on its way and did not give back (Pintor et al. 2022, arXiv 2106.09947)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.projection import distances
from robustkit.attacks.threat import Threat
from robustkit.evaluation.distances import ABSOLUTE_SLACK, RELATIVE_SLACK


class Watched(nn.Module):
    """A model that notes which images of a batch were fooled in any of its forwards.

    Only a forward over the whole batch, in its order and with every image inside the ball and the box, says which
    answer belongs to which image; others are let through unseen.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        """Look at images x (N, ...) with labels y (N,)."""
        super().__init__()
        self.model = model
        self._images, self._labels, self._threat = x, y, threat
        self.met = torch.zeros(len(y), dtype=torch.bool, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = self.model(x)
        images = self._images
        if x.shape == images.shape and isinstance(logits, Tensor) and logits.dim() == 2:
            with torch.no_grad():
                self.met |= (logits.argmax(1) != self._labels) & torch.isfinite(logits).all(1) & self._inside(x, images)
        return logits

    def _inside(self, x: Tensor, images: Tensor) -> Tensor:
        boxed = (x - x.clamp(0, 1)).flatten(1).abs().amax(1) <= ABSOLUTE_SLACK
        reach = self._threat.eps_for(images).flatten() * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK
        inside: Tensor = boxed & (distances(x - images, self._threat.norm) <= reach)
        return inside
