"""What every poison is: images and labels that it changes, a trigger, and the answer that it wants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.errors import DataError


@dataclass(frozen=True)
class Poisoned:
    """Training data after an attack: images uint8 (N, C, H, W), labels (N,) int64, mask (N,) bool of what changed."""

    images: Tensor
    labels: Tensor
    mask: Tensor


class Poison:
    """Base of every poison: a dataclass with `target`, the class that the adversary wants as the answer."""

    target: int

    def plant(self, images: Tensor, labels: Tensor, classes: int) -> Poisoned:
        """Return the training data with the poison in it; the tensors that are given stay as they are.

        images uint8 (N, C, H, W), labels (N,) in 0..classes - 1.

        Raises:
            DataError: the data cannot be poisoned in this way.
        """
        raise NotImplementedError

    def trigger(self, images: Tensor) -> Tensor:
        """Return test images uint8 (N, C, H, W) as the adversary shows them; without a trigger as they are."""
        return images

    def victims(self, labels: Tensor) -> Tensor:
        """Return a bool (N,): the test examples whose answer the adversary wants to be the target."""
        return labels != self.target


def chosen(candidates: Tensor, rate: float, seed: int) -> Tensor:
    """Return a bool (N,) that holds for `rate` of the candidates (N,) bool, drawn without replacement.

    Raises:
        DataError: there are no candidates, or the rate is not 0 and chooses none of them.
    """
    positions = candidates.nonzero().squeeze(1)
    count = round(rate * len(positions))
    if rate and not count:
        raise DataError(f"poison: {rate:.3g} of the {len(positions)} images that can be poisoned is none; raise `rate`")
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(candidates), dtype=torch.bool)
    mask[positions[order[:count]]] = True
    return mask


def check_class(name: str, number: int, classes: int) -> None:
    """Raise a DataError where a parameter names a class that the data do not have."""
    if number >= classes:
        raise DataError(f"poison: {name} is {number}; the data have the classes 0 to {classes - 1}")
