"""Distillation: a student learns from what a trained teacher answers, under attack or without one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.attacks.threat import Threat
from robustkit.defenses.budget import require_norm, step_length, target_of, warmed
from robustkit.defenses.frozen import frozen
from robustkit.defenses.inner import ascend, kl_divergence, kl_score, near_start, pgd_examples
from robustkit.defenses.teacher import Seat, Teacher
from robustkit.errors import ModelError
from robustkit.params import Fraction, PositiveFloat, PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 * KL(p_teacher || p_student) of each example (N,), both softened (Hinton et al. 2015).

    student, teacher: logits (N, classes), divided by the temperature. The square keeps the gradients as large as at
    temperature 1.

    Raises:
        ModelError: the two have different numbers of classes.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the teacher answers with logits {tuple(teacher.shape)}, the student with {tuple(student.shape)}: "
            "both must know the same classes"
        )
    return temperature**2 * kl_divergence(teacher.float() / temperature, student.float() / temperature)


def taught_loss(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, weight: float) -> Tensor:
    """Return weight * distillation_loss + (1 - weight) * cross-entropy of each example (N,) (Hinton et al. 2015).

    student, teacher: logits (N, classes). target: labels (N,) or soft targets (N, classes). weight in [0, 1].
    """
    learned = weight * distillation_loss(student, teacher, temperature)
    if weight == 1:
        return learned
    return learned + (1 - weight) * F.cross_entropy(student.float(), target, reduction="none")


def ard_loss(
    adversarial: Tensor, clean: Tensor | None, teacher: Tensor, target: Tensor, *, temperature: float, weight: float
) -> Tensor:
    """Return weight * T^2 * KL(teacher || adversarial) + (1 - weight) * CE(clean, target), (N,) (Goldblum et al. 2020).

    adversarial, clean: the student's logits (N, classes) of perturbed and of clean images; without clean ones the
    second term is left out. teacher: its logits of the clean images. target: labels (N,) or soft targets (N, classes).
    """
    learned = weight * distillation_loss(adversarial, teacher, temperature)
    if clean is None:
        return learned
    return learned + (1 - weight) * F.cross_entropy(clean.float(), target, reduction="none")


def rslad_loss(adversarial: Tensor, clean: Tensor | None, teacher: Tensor, *, weight: float) -> Tensor:
    """Return weight * KL(teacher || adversarial) + (1 - weight) * KL(teacher || clean), (N,) (Zi et al. 2021).

    adversarial, clean: the student's logits (N, classes) of perturbed and of clean images; without clean ones the
    second term is left out. teacher: its logits of the clean images; no label is used.
    """
    learned = weight * distillation_loss(adversarial, teacher, 1.0)
    return learned if clean is None else learned + (1 - weight) * distillation_loss(clean, teacher, 1.0)


def rslad_examples(
    model: nn.Module,
    x: Tensor,
    teacher: Tensor,
    threat: Threat,
    *,
    steps: int,
    alpha: float,
    generator: torch.Generator,
    spread: float = 0.001,
) -> Tensor:
    """Return images (N, C, H, W) that maximise KL(teacher || p(x_adv)) over the threat's ball (Zi et al. 2021).

    teacher: the teacher's logits (N, classes) of the clean images x. alpha: step length in pixel units of the norm.
    The ascent starts at x plus Gaussian noise of standard deviation `spread`.
    """
    begin = near_start(x, threat, generator, spread)
    with frozen(model, passes=steps) as passes:
        return ascend(passes, kl_score(teacher), x, begin, threat, steps=steps, alpha=alpha)


@dataclass(frozen=True)
class Distill(Defense):
    """Learn from a teacher's softened answers: distillation (Hinton et al. 2015).

    temperature softens both; weight is the teacher's share of the loss, the rest is cross-entropy to the labels. Where
    another defense perturbs, the student sees the perturbed images and the teacher the clean ones.
    """

    temperature: PositiveFloat = 4.0
    weight: Fraction = 0.9
    _seat: Seat = field(default_factory=Seat, init=False, repr=False, compare=False)

    def take_teacher(self, teacher: nn.Module) -> None:
        """Keep a frozen copy of the model to learn from."""
        self._seat.taken = Teacher(teacher)

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        answers = self._seat.teacher("distill").logits(batch.x)
        return taught_loss(
            forward.adversarial(), answers, target_of(batch), temperature=self.temperature, weight=self.weight
        )


@dataclass(frozen=True)
class Ard(Defense):
    """Answer under attack as a robust teacher does without: ARD (Goldblum et al. 2020); linf or l2.

    The attack climbs the cross-entropy. weight is the teacher's share of the loss, the rest is cross-entropy on the
    clean images. alpha is the step in pixel units of the norm, by default 2.5 * eps / steps. warmup is the share of
    training over which eps grows from 0.
    """

    temperature: PositiveFloat = 30.0
    weight: Fraction = 1.0
    steps: PositiveInt = 10
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0
    _seat: Seat = field(default_factory=Seat, init=False, repr=False, compare=False)

    def take_teacher(self, teacher: nn.Module) -> None:
        """Keep a frozen copy of the model to learn from."""
        self._seat.taken = Teacher(teacher)

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) that the inner maximisation found, inside ball and box."""
        require_norm("ard", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("ard", self.alpha, 2.5 / self.steps, threat, ramp)
        target = target_of(batch)
        return pgd_examples(
            step.model, batch.x, target, threat, steps=self.steps, alpha=alpha, generator=step.generator
        )

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        answers = self._seat.teacher("ard").logits(batch.x)
        clean = forward.clean() if self.weight < 1 else None
        return ard_loss(
            forward.adversarial(),
            clean,
            answers,
            target_of(batch),
            temperature=self.temperature,
            weight=self.weight,
        )

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup


@dataclass(frozen=True)
class Rslad(Defense):
    """Learn from a robust teacher's answers alone, in attack and loss: RSLAD (Zi et al. 2021); linf or l2.

    No label is used. weight is the share of the perturbed images in the loss, the rest is that of the clean ones. alpha
    is the step in pixel units of the norm, by default 2.5 * eps / steps. warmup is the share of training over which eps
    grows from 0.
    """

    weight: Fraction = 5 / 6
    steps: PositiveInt = 10
    alpha: PositiveFloat | None = None
    warmup: Fraction = 0.0
    _seat: Seat = field(default_factory=Seat, init=False, repr=False, compare=False)

    def take_teacher(self, teacher: nn.Module) -> None:
        """Keep a frozen copy of the model to learn from."""
        self._seat.taken = Teacher(teacher)

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        """Return the images (N, C, H, W) on which the student is furthest from the teacher, inside ball and box."""
        require_norm("rslad", step.threat, ("linf", "l2"))
        threat, ramp = warmed(step, self.warmup)
        alpha = step_length("rslad", self.alpha, 2.5 / self.steps, threat, ramp)
        answers = self._seat.teacher("rslad").logits(batch.x)
        return rslad_examples(
            step.model, batch.x, answers, threat, steps=self.steps, alpha=alpha, generator=step.generator
        )

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor:
        """Return the loss of each example (N,)."""
        answers = self._seat.teacher("rslad").logits(batch.x)
        clean = forward.clean() if self.weight < 1 else None
        return rslad_loss(forward.adversarial(), clean, answers, weight=self.weight)

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint may be selected while eps still grows."""
        return step.progress >= self.warmup
