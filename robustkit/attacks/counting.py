"""Counts what an attack costs: examples that went forward and backward through the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from robustkit.attacks.engine import PLAIN, Engine


class CountedModel(nn.Module):
    """A model that counts examples, summed over all calls; a backward counts when a gradient reaches the logits.

    `engine`: the way in which the model is run.
    """

    def __init__(self, model: nn.Module, engine: Engine = PLAIN) -> None:
        super().__init__()
        self.model = model
        self.engine = engine
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.count(x, self.engine(self.model, x))

    def count(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return logits that were found for images x, counted: forward now, backward when a gradient reaches them."""
        self.forwards += x.shape[0]
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += gradient.shape[0]

    @contextmanager
    def running(self, engine: Engine) -> Iterator[None]:
        """Run the model in another way meanwhile."""
        before, self.engine = self.engine, engine
        try:
            yield
        finally:
            self.engine = before
