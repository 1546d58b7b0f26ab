"""Adversarial training: the defenses that raise accuracy under attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from robustkit.attacks.threat import Threat
from robustkit.defenses.budget import checked_alpha, require_norm, step_length, target_of, warmed
from robustkit.defenses.inner import kl_divergence, n_fgsm_examples, pgd_examples, trades_examples
from robustkit.errors import UsageError
from robustkit.params import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step


def trades_loss(clean: Tensor, adversarial: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return CE(clean, target) + beta * KL(p_clean || p_adversarial) of each example (N,) (Zhang et al. 2019).

    clean, adversarial: logits (N, classes). target: labels (N,) or soft targets (N, classes).
    """
    natural = F.cross_entropy(clean.float(), target, reduction="none")
    return natural + beta * kl_divergence(clean, adversarial)


@dataclass(frozen=True)
class PgdTraining(Defense):
    """Train on PGD examples of every batch (Madry et al. 2018); linf or l2.

    alpha is the step in pixel units of the norm, by default 2.5 * eps / steps. warmup is the share of training over
    which eps grows from 0. margin as loss climbs the best wrong logit minus the right one.
    """

    steps: PositiveInt = 7
    alpha: PositiveFloat | None = None
    restarts: PositiveInt = 1
    random_start: bool = True
    loss: Literal["ce", "margin"] = "ce"
    warmup: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.restarts > 1 and not self.random_start:
            raise UsageError("pgd_training: restarts need random_start: true, or each one finds the same example")

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) that the inner maximisation found, inside ball and box."""
        require_norm("pgd_training", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        return pgd_examples(
            step.model,
            batch.x,
            batch.y if self.loss == "margin" else target_of(batch),
            threat,
            steps=self.steps,
            alpha=step_length("pgd_training", self.alpha, 2.5 / self.steps, threat, ramp),
            generator=step.generator,
            restarts=self.restarts,
            start=self.random_start,
            loss=self.loss,
        )

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup


@dataclass(frozen=True)
class NFgsm(Defense):
    """Train on noisy single-step examples: N-FGSM (de Jorge et al. 2022); linf.

    noise is in multiples of eps; alpha is the step in pixel units, by default eps. The perturbation is not clipped to
    the eps ball, which is what keeps single-step training from catastrophic overfitting; the image stays in [0, 1].
    """

    noise: NonNegativeFloat = 2.0
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W): in the box and within noise * eps + alpha of the originals."""
        require_norm("n_fgsm", step.threat, ("linf",))
        threat, ramp = warmed(step, self.warmup)
        alpha = threat.eps_for(batch.x) if self.alpha is None else checked_alpha("n_fgsm", self.alpha) * ramp
        return n_fgsm_examples(
            step.model,
            batch.x,
            target_of(batch),
            threat.eps,
            alpha=alpha,
            noise=self.noise,
            generator=step.generator,
        )

    def budget(self, threat: Threat) -> float:
        """Return noise * eps + alpha: the noise and the step are not clipped."""
        eps = float(threat.eps)
        return self.noise * eps + (eps if self.alpha is None else self.alpha)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup


@dataclass(frozen=True)
class Trades(Defense):
    """Trade clean accuracy for stable predictions: TRADES (Zhang et al. 2019); linf or l2.

    beta weighs KL(p_clean || p_adversarial) against the clean cross-entropy. alpha is the step in pixel units of the
    norm, by default 2.5 * eps / steps. warmup is the share of training over which eps grows from 0.
    """

    beta: NonNegativeFloat = 6.0
    steps: PositiveInt = 10
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) whose predictions are furthest from the clean ones, inside ball and box."""
        require_norm("trades", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("trades", self.alpha, 2.5 / self.steps, threat, ramp)
        return trades_examples(step.model, batch.x, threat, steps=self.steps, alpha=alpha, generator=step.generator)

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        return trades_loss(forward.clean(), forward.adversarial(), target_of(batch), self.beta)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup
