"""Wrong labels without any trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.data.poison.base import Poison, Poisoned, check_class, chosen
from robustkit.errors import DataError
from robustkit.params import Fraction, NonNegativeInt


@dataclass(frozen=True)
class LabelFlip(Poison):
    """The label of the target on images of another class or of all others (label flipping, Biggio et al. 2011).

    rate: the share of those images that is relabelled; source: the one class they are taken from, or all others. The
    attack succeeds where a test image of those classes is taken for the target.
    """

    target: NonNegativeInt = 0
    rate: Fraction = 0.2
    source: NonNegativeInt | None = None
    seed: NonNegativeInt = 0

    def plant(self, images: Tensor, labels: Tensor, classes: int) -> Poisoned:
        """Return the training data with other labels."""
        check_class("target", self.target, classes)
        check_class("source", self.source or 0, classes)
        if self.source == self.target:
            raise DataError(f"poison: source and target are both {self.target}; nothing would be flipped")
        mask = chosen(self.victims(labels), self.rate, self.seed)
        return Poisoned(images, torch.where(mask, self.target, labels), mask)

    def victims(self, labels: Tensor) -> Tensor:
        """Return a bool (N,): the examples of the source class, or of every class but the target."""
        return labels != self.target if self.source is None else labels == self.source
