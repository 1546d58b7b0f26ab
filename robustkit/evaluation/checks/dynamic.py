"""P4: a model that runs a backward pass of its own while it answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from robustkit.evaluation.checks.batch import flag
from robustkit.results import Flag


def backwards_within(model: nn.Module, x: Tensor) -> int:
    """Return how many tensors backward passes inside `forward` ask for: 0 for a model that only goes forward.

    A forward saves tensors for the backward pass; that one is asked for again while the forward still runs means that
    a backward pass runs in it, whatever it differentiates and in whichever way it was called.
    """
    asked = [0]

    def unpack(saved: Tensor) -> Tensor:
        asked[0] += 1
        return saved

    with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, unpack):
        kept = model(x.clone().requires_grad_(True))
        found = asked[0]
    del kept
    return found


def dynamic_defense(model: nn.Module, x: Tensor) -> list[Flag]:
    """P4: a defence that optimises at test time moves with every attack (Croce et al. 2022, arXiv 2202.13711)."""
    if not backwards_within(model, x):
        return []
    message = (
        "the model runs a backward pass while it answers (a defence that optimises at test time?): gradients through "
        "it are not those of its answer; attack the model without that part too, and hand its images on to this one"
    )
    return [flag("P4", "doubt", message)]
