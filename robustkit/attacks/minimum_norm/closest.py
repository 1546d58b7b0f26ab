"""The closest images that fool the model, kept while an attack looks around: no example ever leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustkit.attacks.losses import as_logits, margin, soft_margin
from robustkit.attacks.projection import DUAL, distances, random_start
from robustkit.attacks.search import input_gradient
from robustkit.attacks.threat import Norm, Threat

HAIR = 1e-6
"""An image counts if its margin is above this share of the largest logit: the last bits of a sum must not decide."""


class Closest:
    """The smallest change of each example of x (N, ...) in [0, 1] that fooled the model so far.

    `best` (N, ...) are the images, x itself where there was none; `shortest` (N,) their distances in the norm,
    infinite where there was none. Every step is one forward of all examples and waits for nothing.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> None:
        self.model, self.x, self.y, self.norm = model, x.detach(), y, norm
        self.best = self.x.clone()
        self.shortest = torch.full((len(x),), torch.inf, device=x.device)

    @property
    def largest(self) -> float:
        """The norm of the largest change that a box of this size allows."""
        values = self.x[:1].numel()
        return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values), "l0": float(values)}[self.norm]

    def slope(self, gradient: Tensor) -> Tensor:
        """Return how much a unit of the norm can change what has this gradient (N, ...), to first order (N,)."""
        size: Tensor = torch.linalg.vector_norm(gradient.flatten(1), ord=DUAL[self.norm], dim=1)
        return size.clamp_min(torch.finfo(size.dtype).tiny)

    def wide(self, values: Tensor) -> Tensor:
        """Return one value an example (N,) shaped to broadcast over the images."""
        return values.view(-1, *[1] * (self.x.dim() - 1))

    def gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Try images (N, ...) with one forward and one backward; return their margins (N,) and the way up (N, ...).

        The way up is the gradient of the soft margin, which heeds all classes that are near, as cross-entropy does.

        Raises:
            AttackError: the model's output has no gradient.
        """
        start = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = as_logits(self.model(start).float())
            score = soft_margin(logits, self.y)
        gradient = input_gradient(score.sum(), start)
        self.look(start.detach(), logits.detach())
        return margin(logits.detach(), self.y), gradient

    def probe(self, images: Tensor) -> Tensor:
        """Try images (N, ...) with one forward; return which fool the model (N,)."""
        with torch.no_grad():
            logits = as_logits(self.model(images).float())
        return self.look(images, logits)

    def look(self, images: Tensor, logits: Tensor) -> Tensor:
        """Keep the images that fool the model and are closer than the best so far; return which fool it (N,)."""
        fooled = (margin(logits, self.y) > HAIR * logits.abs().amax(1)) & torch.isfinite(logits).all(1)
        length = distances(images - self.x, self.norm)
        closer = fooled & (length < self.shortest)
        self.best = torch.where(self.wide(closer), images, self.best)
        self.shortest = torch.where(closer, length, self.shortest)
        return fooled

    def elsewhere(self, generator: torch.Generator) -> Tensor:
        """Return random images no farther away than the best ones: where a restart begins."""
        reach = torch.where(torch.isinf(self.shortest), self.largest / 2, self.shortest)
        return random_start(self.x, Threat(self.norm, 0.0).with_eps(reach), generator)
