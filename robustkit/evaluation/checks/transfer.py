"""Adversarial images of one model tried on another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import pgd
from robustkit.errors import AttackError
from robustkit.evaluation.attacked import device_of
from robustkit.evaluation.checks.batch import Batch, flag
from robustkit.evaluation.compare import Bools
from robustkit.evaluation.rules import transfer_flags
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Flag

STEPS = 20


def surrogate_images(batch: Batch, surrogate: nn.Module) -> Tensor:
    """Return what pgd of 20 steps finds on the surrogate for the batch's images.

    Raises:
        AttackError: the surrogate's output has no gradient.
    """
    place = device_of(surrogate, batch.x.device)
    x, y, threat = batch.x.to(place), batch.y.to(place), batch.threat.to(place)
    generator = torch.Generator(device=place).manual_seed(batch.seed)
    with undisturbed(surrogate), torch.enable_grad():
        return pgd(surrogate, x, y, threat, steps=STEPS, generator=generator).to(batch.x.device)


def transfer(
    batch: Batch, surrogate: nn.Module, whole: Callable[[Tensor], Bools], white_box: Bools, *, compressed: bool
) -> list[Flag]:
    """E5, or E17 of a model compressed from the surrogate: images of the surrogate tried on the batch's model.

    `whole` makes (N,) of all examples of (n,) of the batch; `white_box` (N,): right under attacks on the model itself.
    """
    try:
        images = surrogate_images(batch, surrogate)
    except AttackError:
        message = "the surrogate has no gradient, so none of its images could be tried: give a differentiable one"
        return [flag("E17" if compressed else "E5", "note", message)]
    return transfer_flags(white_box, whole(batch.right(images)), compressed=compressed)
