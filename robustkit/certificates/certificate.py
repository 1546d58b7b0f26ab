"""What a certificate is: a proof, or a proof with a stated chance of error, that no adversary changes a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat

ABSTAINED = -1
"""The prediction of a certificate that could not tell which class it is."""


@dataclass(frozen=True)
class Certified:
    """One entry an example, in the order of the batch."""

    certified: Tensor
    """Bool (N,): the label is predicted on every image of the threat's ball in [0, 1]."""
    prediction: Tensor
    """Int64 (N,): the class that the judged classifier gives the image, ABSTAINED where it gives none."""
    radius: Tensor
    """Float (N,): how far around the image the prediction is known to hold, in the certificate's own norm; 0 where
    nothing is known."""
    forwards: int = 0
    """Examples that went through the model, summed over all calls."""


class Certificate(Protocol):
    """Parameters at construction; model and budget at call.

    `smoothed`: whether it judges another classifier that is made of the model, and not the model itself. What it says
    is then no statement on an attack of the model.
    """

    smoothed: ClassVar[bool]

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
    ) -> Certified:
        """Return what is certain about x (N, ...) in [0, 1] with labels y (N,).

        `model` returns logits (N, classes) and is in eval mode; the certificate leaves it as it found it.
        """
        ...
