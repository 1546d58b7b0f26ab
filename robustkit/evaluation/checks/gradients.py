"""Checks that gradients are there: finite, not zero, and not swallowed by a saturated cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.losses import cross_entropy, margin
from robustkit.attacks.projection import random_start
from robustkit.evaluation.checks.batch import Batch, flag, input_gradients
from robustkit.results import Flag

ZERO_DOUBT = 0.01
ZERO_WRONG = 0.10
SATURATED = 0.10
SURE = 1e-7
"""A class as likely as 1 minus this leaves cross-entropy next to nothing."""


def gradient_flags(batch: Batch) -> list[Flag]:
    """P8, P9, P10: the gradients at the images and at a random point of the ball around each."""
    near = random_start(batch.x, batch.threat, batch.generator())
    both = Batch(batch.model, torch.cat([batch.x, near]), torch.cat([batch.y, batch.y]), batch.threat, batch.seed)
    gradient = input_gradients(both, both.x, margin)
    if gradient is None:
        message = (
            "the logits do not depend on the images by gradients: attack a differentiable surrogate, or by queries"
        )
        return [flag("P9", "wrong", message)]
    if not bool(torch.isfinite(gradient).all()):
        return [flag("P8", "wrong", "input gradients are not finite: gradient attacks cannot work on this model")]
    share = _dead(gradient)
    if share <= ZERO_DOUBT:
        return _saturation(both)
    message = (
        f"{share:.0%} of the examples have an input gradient of exactly zero: gradient attacks are blind there; attack "
        "a smooth surrogate, or use a gradient-free attack"
    )
    return [flag("P9", "wrong" if share > ZERO_WRONG else "doubt", message)]


def _dead(gradient: Tensor) -> float:
    """Return the share of examples whose gradient is exactly zero."""
    return float((gradient.flatten(1).abs().amax(1) == 0).float().mean())


def _saturation(both: Batch) -> list[Flag]:
    start = both.x.clone().requires_grad_(True)
    logits = both.model(start).float()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, both.y).sum(), start)
    share = _dead(gradient)
    if share > SATURATED:
        message = (
            f"cross-entropy is saturated: its gradient is exactly zero on {share:.0%} of the examples, the margin's "
            "not; attack with loss: margin, and do not quote attacks that use cross-entropy"
        )
        return [flag("P10", "doubt", message)]
    wrong = logits.detach().softmax(1).scatter(1, both.y[:, None], 0.0).sum(1)
    sure = float((wrong < SURE).float().mean())
    if sure <= SATURATED:
        return []
    message = (
        f"the class of {sure:.0%} of the examples is certain to 1e-7: cross-entropy has little left to climb; attack "
        "with loss: margin too"
    )
    return [flag("P10", "note", message)]
