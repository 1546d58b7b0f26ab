"""Counts what an attack costs: examples that went forward and backward through the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.layout import laid_out


class CountedModel(nn.Module):
    """A model that counts examples, summed over all calls; a backward counts when a gradient reaches the logits.

    `layout`: the memory layout in which the model gets its images.
    """

    def __init__(self, model: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        self.forwards += x.shape[0]
        logits: Tensor = self.model(laid_out(x, self.layout))
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += gradient.shape[0]
