"""Batch norm's running statistics, measured anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def measure_statistics_(
    model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], batches: Iterable[Tensor]
) -> None:
    """Set the means and variances of these batch norms of a model to their averages over batches (N, C, H, W).

    Everything else runs in eval mode, and the model keeps its modes; parameters stay. Without a batch the statistics
    are those of a new layer.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            # No momentum: the plain average over all batches.
            norm.momentum = None
        for x in batches:
            model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
