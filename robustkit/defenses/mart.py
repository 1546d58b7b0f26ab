"""MART: adversarial training that looks harder at what the model gets wrong already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from robustkit.defenses.budget import require_norm, step_length, target_of, warmed
from robustkit.defenses.inner import kl_divergence, pgd_examples
from robustkit.params import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step


def log_other(logits: Tensor, y: Tensor) -> Tensor:
    """Return log(1 - p) of the likeliest wrong class's probability p (N,), exact where p is close to 1."""
    rival = logits.scatter(1, y[:, None], float("-inf")).argmax(1, keepdim=True)
    return logits.scatter(1, rival, float("-inf")).logsumexp(1) - logits.logsumexp(1)


def mart_loss(clean: Tensor, adversarial: Tensor, y: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return MART's loss of each example (N,) (Wang et al. 2020).

    CE(adversarial, target) - log(1 - max_{k != y} p_adversarial[k])
    + beta * KL(p_clean || p_adversarial) * (1 - p_clean[y]).
    clean, adversarial: logits (N, classes). y: labels (N,); target: these, or soft targets (N, classes).
    """
    clean, adversarial = clean.float(), adversarial.float()
    boosted = F.cross_entropy(adversarial, target, reduction="none") - log_other(adversarial, y)
    unsure = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
    return boosted + beta * kl_divergence(clean, adversarial) * unsure


@dataclass(frozen=True)
class Mart(Defense):
    """Weigh the pull to clean predictions by how wrong they are: MART (Wang et al. 2020); linf or l2.

    beta weighs that pull. The inner maximisation is PGD on the cross-entropy; alpha is its step in pixel units of the
    norm, by default 2.5 * eps / steps. warmup is the share of training over which eps grows from 0.
    """

    beta: NonNegativeFloat = 5.0
    steps: PositiveInt = 10
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) that the inner maximisation found, inside ball and box."""
        require_norm("mart", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        return pgd_examples(
            step.model,
            batch.x,
            target_of(batch),
            threat,
            steps=self.steps,
            alpha=step_length("mart", self.alpha, 2.5 / self.steps, threat, ramp),
            generator=step.generator,
        )

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        return mart_loss(forward.clean(), forward.adversarial(), batch.y, target_of(batch), self.beta)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup
