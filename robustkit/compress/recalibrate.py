"""Batch norm's statistics measured again after pruning, without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.errors import ModelError
from robustkit.models.widths import NORMS
from robustkit.params import PositiveInt


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set each batch norm's mean and variance to their averages over batches (N, C, H, W); return how many there are.

    Weights and biases stay. Everything else runs in eval mode, and the model keeps its modes.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            # No momentum: the plain average over all batches.
            norm.momentum = None
        if norms:
            for x in batches:
                model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)


@dataclass(frozen=True)
class Recalibrate:
    """Measure batch norm's means and variances again on training images, after pruning (Li et al. 2020, EagleEye)."""

    examples: PositiveInt = 2048
    batch_size: PositiveInt = 128

    def finish(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the model with new statistics; the report says how many layers have them.

        Raises:
            ModelError: batches of one image, and a batch norm that finds no variance in one.
        """
        x, _ = context.batch(self.examples)
        parts = x.split(self.batch_size)
        # One image may have no variance.
        several = [part for part in parts if len(part) > 1]
        try:
            count = recalibrate(model, several or parts)
        except ValueError as error:
            raise ModelError(f"recalibrate: batches of two images or more are needed: {error}") from error
        context.note(f"recalibrate: {count} batch norms measured on {len(x)} training images")
        return model
