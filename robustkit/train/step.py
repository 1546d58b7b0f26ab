"""One training step: the hooks in their order, one backward, no host sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.precision import autocast
from robustkit.train.audits import audited_perturb
from robustkit.train.hooks import Batch, Defense, Forward, Step, is_adversarial
from robustkit.train.pieces import Piece, pieces

Perturb = Callable[[Defense, Batch, Step], Tensor | None]
Hooked = Sequence[tuple[Defense, Step]]
"""Each defense with the step as it sees it (its own generator)."""


def train_step(
    model: Callable[[Tensor], Tensor],
    batch: Batch,
    hooked: Hooked,
    optimizer: torch.optim.Optimizer,
    *,
    precision: torch.dtype | None,
    instead: Defense | None = None,
    audit: bool = False,
    accumulate: int = 1,
) -> tuple[Tensor, Tensor]:
    """Do the optimizer steps of one batch and return the last (loss, number of right predictions) on the device.

    instead: what perturbs in place of the defense that owns `perturb`. audit: look closely at what it does, which
    waits for the device. accumulate: in so many pieces, one after the other, from `perturb` to the backward; their
    gradients add up to those of the batch.

    Order: ramp, transform_batch, then as often as a defense replays the batch (else once): perturb, around_step,
    objective (else cross-entropy), penalty, backward, second_pass, after_backward, step, after_step.
    """
    hooked = ramped(hooked)
    with autocast(batch.x.device.type, precision):
        for defense, step in hooked:
            batch = defense.transform_batch(batch, step)
    attack = audited_perturb if audit else plain_perturb
    parts = pieces(batch, accumulate)
    found = optimized(model, parts, hooked, optimizer, precision=precision, instead=instead, attack=attack)
    for _ in range(1, max((defense.replays() for defense, _ in hooked), default=1)):
        found = optimized(model, parts, hooked, optimizer, precision=precision, instead=instead, attack=attack)
    return found


def optimized(
    model: Callable[[Tensor], Tensor],
    parts: Sequence[Piece],
    hooked: Hooked,
    optimizer: torch.optim.Optimizer,
    *,
    precision: torch.dtype | None,
    instead: Defense | None,
    attack: Perturb,
) -> tuple[Tensor, Tensor]:
    """Do one optimizer step on a batch in pieces; return (loss, number of right predictions) on the device."""
    optimizer.zero_grad(set_to_none=True)
    losses, rights = [], []
    for batch, share in parts:
        with autocast(batch.x.device.type, precision):
            loss, right = gradients(model, batch, share, hooked, optimizer, instead=instead, attack=attack)
        losses.append(loss)
        rights.append(right)
    for defense, step in hooked:
        defense.after_backward(step)
    optimizer.step()
    for defense, step in hooked:
        defense.after_step(step)
    if len(parts) == 1:
        return losses[0], rights[0]
    return torch.stack(losses).sum(), torch.stack(rights).sum()


def gradients(
    model: Callable[[Tensor], Tensor],
    batch: Batch,
    share: Tensor | float,
    hooked: Hooked,
    optimizer: torch.optim.Optimizer,
    *,
    instead: Defense | None,
    attack: Perturb,
) -> tuple[Tensor, Tensor]:
    """Add a piece's share of the gradients; return its share of the loss and its number of right predictions."""
    for defense, step in hooked:
        if is_adversarial(defense) and step.ramp > 0:
            found = attack(instead or defense, batch, step)
            batch.x_adv = batch.x_adv if found is None else found.detach()
    forward = Forward(model, batch, lambda forward: main_loss(batch, forward, hooked))
    with ExitStack() as stack:
        for defense, step in hooked:
            stack.enter_context(defense.around_step(batch, forward, step))
        loss = total_loss(batch, forward, hooked)
        loss = loss if isinstance(share, float) and share == 1 else loss * share
        loss.backward()
        right = (forward.adversarial().detach().argmax(1) == batch.y).sum()
        again(batch, forward, hooked, optimizer)
    return loss.detach(), right


def ramped(hooked: Hooked) -> Hooked:
    """Return the defenses with the threat at the share of eps that their curricula ask for."""
    factor = math.prod(defense.ramp(step) for defense, step in hooked)
    if factor == 1:
        return hooked
    return [
        (defense, replace(step, threat=step.threat.scaled(factor), ramp=step.ramp * factor)) for defense, step in hooked
    ]


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


def plain_perturb(defense: Defense, batch: Batch, step: Step) -> Tensor | None:
    """Return what the defense's perturb returns."""
    return defense.perturb(batch, step)


def main_loss(batch: Batch, forward: Forward, hooked: Hooked) -> Tensor:
    """Return the mean main loss, weighted where batch or defenses have weights: an objective's, else cross-entropy."""
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
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def total_loss(batch: Batch, forward: Forward, hooked: Hooked) -> Tensor:
    """Return the mean main loss plus every penalty."""
    loss = main_loss(batch, forward, hooked)
    for defense, step in hooked:
        penalty = defense.penalty(batch, forward, step)
        loss = loss if penalty is None else loss + penalty
    return loss
