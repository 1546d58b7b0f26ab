"""Adversarial training on single steps inside the ball: cheap, and open to catastrophic overfitting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.defenses.budget import require_norm, step_length, target_of, warmed
from robustkit.defenses.frozen import frozen
from robustkit.defenses.inner import ascend, cross_entropy_score, pgd_examples
from robustkit.params import Fraction, PositiveFloat
from robustkit.train.hooks import Batch, Defense, Step


def fgsm_examples(model: nn.Module, x: Tensor, target: Tensor, threat: Threat, *, alpha: float) -> Tensor:
    """Return x (N, C, H, W) after one step of length alpha up the cross-entropy: FGSM (Goodfellow et al. 2015).

    target: labels (N,) or soft targets (N, classes). Under l2 the step follows the normed gradient. The result is
    inside the threat's ball and in [0, 1].
    """
    with frozen(model, passes=1) as passes:
        return ascend(passes, cross_entropy_score(target), x, x, threat, steps=1, alpha=alpha)


def fgsm_rs_examples(
    model: nn.Module, x: Tensor, target: Tensor, threat: Threat, *, alpha: float, generator: torch.Generator
) -> Tensor:
    """Return x (N, C, H, W) after one step of length alpha from a random point of the ball (Wong et al. 2020).

    target: labels (N,) or soft targets (N, classes). The result is projected onto the threat's ball and [0, 1].
    """
    return pgd_examples(model, x, target, threat, steps=1, alpha=alpha, generator=generator)


@dataclass(frozen=True)
class Fgsm(Defense):
    """Train on one step from the image itself: FGSM (Goodfellow et al. 2015); linf or l2.

    alpha is the step in pixel units of the norm, by default eps. warmup is the share of training over which eps grows
    from 0. At larger eps it collapses to catastrophic overfitting (Wong et al. 2020): here to be compared.
    """

    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) after the step, inside ball and box."""
        require_norm("fgsm", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("fgsm", self.alpha, 1.0, threat, ramp)
        return fgsm_examples(step.model, batch.x, target_of(batch), threat, alpha=alpha)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup


@dataclass(frozen=True)
class FgsmRs(Defense):
    """Train on one step from a random start: FGSM-RS, "fast is better than free" (Wong et al. 2020); linf.

    alpha is the step in pixel units, by default 1.25 * eps; the sum is projected onto the eps ball. warmup is the
    share of training over which eps grows from 0. Long trainings and larger eps still collapse: n_fgsm does not.
    """

    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) after the step, inside ball and box."""
        require_norm("fgsm_rs", step.threat, ("linf",))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("fgsm_rs", self.alpha, 1.25, threat, ramp)
        return fgsm_rs_examples(step.model, batch.x, target_of(batch), threat, alpha=alpha, generator=step.generator)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup
