"""Poison whose labels are right: a human who looks at it finds nothing to object to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustkit.data.poison.backdoor import check_size, stamped
from robustkit.data.poison.base import Poison, Poisoned, check_class, chosen
from robustkit.data.split import Split, split_of
from robustkit.params import Eps, Fraction, NonNegativeInt, PositiveInt
from robustkit.seeding import derive_seed
from robustkit.train.modes import attack_mode
from robustkit.train.probe import Probe

SURROGATE_IMAGES = 10_000
"""The surrogate is trained on so many images at most: its features need not be good, only those of the data."""
_BLOCK = 500
STEP = 2.5
"""The steps of the ascent together, in multiples of eps (Madry et al. 2018)."""


def harder(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, steps: int, seed: int) -> Tensor:
    """Return images within eps (linf, of [0, 1]) that `model` no longer takes for their labels (N,).

    images uint8 (N, C, H, W), and so is what comes back. Cross-entropy is climbed by `steps` of projected gradient
    ascent from a random start (Madry et al. 2018), to the end:
    what is natural of the class is hidden, so that a network trained on these images has to learn the trigger.
    """
    generator = torch.Generator().manual_seed(seed)
    with attack_mode(model):
        blocks = zip(images.split(_BLOCK), labels.split(_BLOCK), strict=True)
        found = [_climbed(model, block, truth, eps, steps, generator) for block, truth in blocks]
    return torch.cat(found) if found else images


def _climbed(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    clean = images.to(torch.float32).div(255)
    delta = (2 * torch.rand(clean.shape, generator=generator) - 1) * eps
    for _ in range(steps):
        x = (clean + delta).clamp(0, 1).requires_grad_(True)
        (slope,) = torch.autograd.grad(functional.cross_entropy(model(x), labels, reduction="sum"), x)
        delta = (x.detach() + STEP / steps * eps * slope.sign() - clean).clamp(-eps, eps)
    # Towards the clean image, which keeps the budget; what rounding took from a whole step is given back before.
    levels = torch.trunc(255 * delta + 1e-3 * delta.sign())
    return (images + levels).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class CleanLabel(Poison):
    """A patch on perturbed images of the target class, whose labels stay right (label-consistent, Turner et al. 2019).

    rate: the share of the target's training images that is poisoned. Before they get the patch of `size` pixels they
    are moved by at most eps (linf) away from their class, as a small network sees it that is trained on clean data.
    """

    target: NonNegativeInt = 0
    rate: Fraction = 0.5
    eps: Eps = 0.2
    steps: PositiveInt = 20
    size: PositiveInt = 3
    seed: NonNegativeInt = 0

    def plant(self, images: Tensor, labels: Tensor, classes: int) -> Poisoned:
        """Return the training data with perturbed and stamped images of the target class."""
        check_class("target", self.target, classes)
        check_size(self.size, images)
        mask = chosen(labels == self.target, self.rate, self.seed)
        planted = images.clone()
        if mask.any():
            model = self._surrogate(split_of(images, labels), classes)
            seed = derive_seed(self.seed, "perturb")
            moved = harder(model, images[mask], labels[mask], eps=self.eps, steps=self.steps, seed=seed)
            planted[mask] = self.trigger(moved)
        return Poisoned(planted, labels, mask)

    def trigger(self, images: Tensor) -> Tensor:
        """Return the images with the patch."""
        return stamped(images, self.size)

    def _surrogate(self, data: Split, classes: int) -> nn.Module:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(self.seed, "surrogate")))
        part = data.select(order[:SURROGATE_IMAGES])
        return Probe(part, classes, torch.device("cpu"), derive_seed(self.seed, "probe")).model
