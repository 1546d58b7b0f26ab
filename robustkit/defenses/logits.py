"""Penalties on logits: pairing of clean and adversarial ones, and squeezing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustkit.params import NonNegativeFloat
from robustkit.train.hooks import Batch, Defense, Forward, Step


def paired(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Return the mean squared difference of two batches of logits (N, classes), a scalar (Kannan et al. 2018)."""
    return (clean.float() - adversarial.float()).square().mean()


def squeezed(logits: Tensor) -> Tensor:
    """Return the mean squared logit of a batch (N, classes), a scalar (clean logit squeezing, Kannan et al. 2018)."""
    return logits.float().square().mean()


@dataclass(frozen=True)
class LogitPairing(Defense):
    """Pair the logits of clean and adversarial images (Kannan et al. 2018).

    amount weighs their mean squared difference, which is nothing while eps is 0; where no defense of the variant
    perturbs images, it weighs the mean squared logit of the clean ones (logit squeezing).
    """

    amount: NonNegativeFloat = 0.5

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """Return the scalar penalty; None where nothing is perturbed yet."""
        if batch.x_adv is None and step.ramp == 0:
            return None
        if batch.x_adv is None:
            return self.amount * squeezed(forward.clean())
        return self.amount * paired(forward.clean(), forward.adversarial())
