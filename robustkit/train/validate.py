"""Clean and attacked accuracy on the validation split, after each epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from robustkit.attacks.losses import margin
from robustkit.attacks.threat import Threat
from robustkit.data.split import Split
from robustkit.defenses.inner import pgd_examples
from robustkit.train.modes import attack_mode

BATCH = 500
ROBUST_EXAMPLES = 500
ROBUST_STEPS = 10
SUBSET_SEED = 20_260_103


def clean_loss_and_accuracy(model: nn.Module, split: Split, device: torch.device) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy on a split, in eval mode."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with attack_mode(model), torch.no_grad():
        for start in range(0, len(split), BATCH):
            x = split.images[start : start + BATCH].to(device).to(torch.float32).div_(255)
            y = split.labels[start : start + BATCH].to(device)
            logits = model(x).float()
            loss = functional.cross_entropy(logits, y, reduction="sum")
            totals += torch.stack([loss, (logits.argmax(1) == y).sum().to(loss.dtype)])
    loss, right = (totals / max(1, len(split))).tolist()
    return loss, right


def robust_subset(split: Split) -> Split:
    """Return at most 500 examples of the validation split, the same ones in every epoch."""
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    return split.select(torch.randperm(len(split), generator=generator)[:ROBUST_EXAMPLES])


class Attacked(NamedTuple):
    """Accuracy under many steps and under one, and the mean margin under many: the best wrong class's probability
    minus that of the right one, in [-1, 1], lower is better."""

    robust: float
    single_step: float
    margin: float = 0.0


def robust_accuracy(model: nn.Module, split: Split, threat: Threat, device: torch.device, *, seed: int) -> Attacked:
    """Return the accuracy and the margin under 10 margin steps from a random start, and accuracy under one full step.

    The margin loss cannot be fooled by saturated probabilities; the gap between the two shows catastrophic
    overfitting.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    eps = float(threat.eps)
    for start in range(0, len(split), BATCH):
        x = split.images[start : start + BATCH].to(device).to(torch.float32).div_(255)
        y = split.labels[start : start + BATCH].to(device)
        many = pgd_examples(model, x, y, threat, steps=ROBUST_STEPS, alpha=eps / 4, generator=generator, loss="margin")
        single = pgd_examples(model, x, y, threat, steps=1, alpha=eps, generator=generator, start=False)
        with attack_mode(model), torch.no_grad():
            attacked, stepped = model(many).float(), model(single)
        # Rounding takes a probability past 1, and weights that are not finite give none: that is as bad as can be.
        margins = margin(attacked.softmax(1), y).nan_to_num(nan=1.0).clamp(-1, 1)
        found = [attacked.argmax(1) == y, stepped.argmax(1) == y, margins]
        totals += torch.stack([one.to(torch.float64).sum() for one in found])
    return Attacked(*(totals / max(1, len(split))).tolist())
