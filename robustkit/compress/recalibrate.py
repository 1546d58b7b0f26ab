"""Batch norm's statistics measured again after pruning, without training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.errors import ModelError
from robustkit.models.statistics import measure_statistics_
from robustkit.models.widths import NORMS
from robustkit.params import PositiveInt


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set each batch norm's mean and variance to their averages over batches (N, C, H, W); return how many there are.

    Weights and biases stay. Everything else runs in eval mode, and the model keeps its modes.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    if norms:
        measure_statistics_(model, norms, batches)
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
