"""Checks on what a model returns: the same each time, logits, for how many classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.evaluation.checks.batch import flag
from robustkit.results import Flag

REPEATS = 4
RANDOM_TOLERANCE = 1e-4
RANDOM_ANSWERS = 0.01
LEAST_ANSWERS = 2
SUM_TOLERANCE = 1e-4
SIGN_TOLERANCE = 1e-5


def randomness(model: nn.Module, x: Tensor, logits: Tensor) -> list[Flag]:
    """P1: ask again; other logits for the same images are noise to an attack, other answers to a reader."""
    scale = logits.norm(dim=1).clamp_min(1e-12)
    again = torch.stack([model(x).float() for _ in range(REPEATS)])
    change = float(((again - logits).norm(dim=2) / scale).max())
    if change <= RANDOM_TOLERANCE:
        return []
    others = int((again.argmax(2) != logits.argmax(1)).any(0).sum())
    share = others / len(x)
    unsteady = others >= LEAST_ANSWERS and share > RANDOM_ANSWERS
    message = (
        f"the same images give other logits each time (relative change {change:.2g}) and {share:.0%} of them another "
        "class: attack and evaluate the average of several passes, robustkit.attacks.adaptive.Eot(model), else the "
        "attack sees noise"
    )
    return [flag("P1", "wrong" if unsteady else "doubt", message)]


def probabilities(logits: Tensor) -> list[Flag]:
    """P2: outputs that went through a softmax already."""
    sums = bool(((logits.sum(1) - 1).abs() < SUM_TOLERANCE).all()) and bool((logits >= -SIGN_TOLERANCE).all())
    logs = bool((logits.logsumexp(1).abs() < SUM_TOLERANCE).all()) and bool((logits <= SIGN_TOLERANCE).all())
    if sums:
        message = "outputs are probabilities: their gradients vanish; return the logits before softmax"
        return [flag("P2", "doubt", message)]
    if logs:
        return [flag("P2", "note", "outputs are log-probabilities; return logits, some attacks fail on these")]
    return []


def few_classes(logits: Tensor) -> list[Flag]:
    """P3: the difference of logits ratio needs the third logit, its targeted form the fourth."""
    classes = logits.shape[1]
    if classes > 3:
        return []
    what = "the difference of logits ratio" if classes == 2 else "the targeted difference of logits ratio"
    message = (
        f"{classes} classes: {what} does not exist, robustkit's attacks take the margin in its place; elsewhere attack "
        "with the margin loss"
    )
    return [flag("P3", "note", message)]
