"""One training step: the hooks in their order, one backward, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.precision import autocast
from robustkit.train.hooks import Batch, Defense, Forward, Step

Hooked = Sequence[tuple[Defense, Step]]
"""Each defense with the step as it sees it (its own generator)."""


def train_step(
    model: Callable[[Tensor], Tensor],
    batch: Batch,
    hooked: Hooked,
    optimizer: torch.optim.Optimizer,
    *,
    precision: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Do one optimizer step and return (loss, number of right predictions) as tensors on the device.

    Order: transform_batch, perturb, around_step, objective (else cross-entropy), penalty, backward, step, after_step.
    """
    with autocast(batch.x.device.type, precision):
        for defense, step in hooked:
            batch = defense.transform_batch(batch, step)
        for defense, step in hooked:
            found = defense.perturb(batch, step)
            if found is not None:
                batch.x_adv = found.detach()
        forward = Forward(model, batch)
        with ExitStack() as stack:
            for defense, step in hooked:
                stack.enter_context(defense.around_step(batch, forward, step))
            loss = total_loss(batch, forward, hooked)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        right = (forward.adversarial().detach().argmax(1) == batch.y).sum()
    optimizer.step()
    for defense, step in hooked:
        defense.after_step(step)
    return loss.detach(), right


def total_loss(batch: Batch, forward: Forward, hooked: Hooked) -> Tensor:
    """Return the mean main loss, weighted where the batch has weights, plus every penalty."""
    losses: Tensor | None = None
    for defense, step in hooked:
        owned = defense.objective(batch, forward, step)
        losses = owned if owned is not None else losses
    if losses is None:
        target = batch.y if batch.target is None else batch.target
        losses = functional.cross_entropy(forward.adversarial().float(), target, reduction="none")
    weight = batch.weight
    for defense, step in hooked:
        chosen = defense.loss_weights(losses.detach(), batch, step)
        if chosen is not None:
            weight = chosen if weight is None else weight * chosen
    loss = losses.mean() if weight is None else (losses * weight).sum() / weight.sum()
    for defense, step in hooked:
        penalty = defense.penalty(batch, forward, step)
        loss = loss if penalty is None else loss + penalty
    return loss
