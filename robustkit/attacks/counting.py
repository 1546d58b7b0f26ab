"""Counts what an attack costs: examples that went forward and backward through the model."""

from __future__ import annotations

from torch import Tensor, nn


class CountedModel(nn.Module):
    """A model that counts examples, summed over all calls; a backward counts when a gradient reaches the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        self.forwards += x.shape[0]
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += gradient.shape[0]
