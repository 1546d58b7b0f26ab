"""One training step: the hooks in their order, one backward, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

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

    Order: transform_batch, perturb, around_step, objective (else cross-entropy), penalty, backward, second_pass,
    after_backward, step, after_step.
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
            again(batch, forward, hooked, optimizer)
    for defense, step in hooked:
        defense.after_backward(step)
    optimizer.step()
    for defense, step in hooked:
        defense.after_step(step)
    return loss.detach(), right


def again(batch: Batch, forward: Forward, hooked: Hooked, optimizer: torch.optim.Optimizer) -> None:
    """Take the gradients a second time, where a defense asks for it, at the weights that it moves to."""
    for defense, step in hooked:
        elsewhere = defense.second_pass(step)
        if elsewhere is not None:
            forward.forget()
            # The first gradients say where to move: they are there until the context is entered.
            with elsewhere:
                optimizer.zero_grad(set_to_none=True)
                total_loss(batch, forward, hooked).backward()


def autocast(device_type: str, precision: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context in which operations run at `precision`; None leaves them as they are."""
    return nullcontext() if precision is None else torch.autocast(device_type, dtype=precision)


def total_loss(batch: Batch, forward: Forward, hooked: Hooked) -> Tensor:
    """Return the mean main loss, weighted where the batch has weights, plus every penalty."""
    losses: Tensor | None = None
    for defense, step in hooked:
        owned = defense.objective(batch, forward, step)
        losses = owned if owned is not None else losses
    if losses is None:
        target = batch.y if batch.target is None else batch.target
        losses = functional.cross_entropy(forward.adversarial().float(), target, reduction="none")
    loss = losses.mean() if batch.weight is None else (losses * batch.weight).sum() / batch.weight.sum()
    for defense, step in hooked:
        penalty = defense.penalty(batch, forward, step)
        loss = loss if penalty is None else loss + penalty
    return loss
