"""Views of a model for attacks that must see past what hides its gradients: BPDA and EOT.

Athalye et al. 2018 (arXiv 1802.00420, section 4), Tramer et al. 2020 (arXiv 2002.08347).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Attack, Threat
from robustkit.errors import ModelError, UsageError

Images = Callable[[Tensor], Tensor]


class _Swapped(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradient, None


class Bpda(nn.Module):
    """A model behind a preprocessing that has no useful gradient: forward through it, backward around it.

    `preprocess` maps images (N, ...) to what `model` takes; its answer is kept exactly. Backward goes through
    `surrogate`, a differentiable function of the images with the same shape of output; by default the identity
    (backward pass differentiable approximation, Athalye et al. 2018, section 4.1).

    Raises:
        ModelError: the surrogate's output has another shape than that of the preprocessing.
    """

    def __init__(self, preprocess: Images, model: nn.Module, surrogate: Images | None = None) -> None:
        super().__init__()
        self.preprocess, self.model, self.surrogate = preprocess, model, surrogate

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of the preprocessed images."""
        with torch.no_grad():
            value = self.preprocess(x.detach())
        smooth = x if self.surrogate is None else self.surrogate(x)
        if smooth.shape != value.shape:
            raise ModelError(
                f"the preprocessing returns {tuple(value.shape)}, what stands for it on the way back "
                f"{tuple(smooth.shape)}; give Bpda a differentiable surrogate with that output"
            )
        logits: Tensor = self.model(_Swapped.apply(smooth, value.to(smooth.dtype)))
        return logits


class Eot(nn.Module):
    """The mean of `passes` answers of a model that draws random numbers (expectation over transformation).

    Each pass draws anew, so forward and backward cost `passes` times as much (Athalye et al. 2018, section 4.2).
    """

    def __init__(self, model: nn.Module, passes: int = 20) -> None:
        if passes < 1:
            raise UsageError(f"passes must be at least 1, not {passes}")
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits (N, classes) of images x."""
        total: Tensor = self.model(x)
        for _ in range(self.passes - 1):
            total = total + self.model(x)
        return total / self.passes


@dataclass(frozen=True)
class Through:
    """An attack on a view of the model; what it finds counts only if the model itself is fooled.

    `view` takes the model and returns what is attacked instead: `lambda model: Eot(model)`, or a surrogate.
    """

    attack: Attack
    view: Callable[[nn.Module], nn.Module]

    @property
    def seeded_by_example(self) -> bool:
        """Whether the attack's random numbers belong to the example, not to the batch."""
        return bool(getattr(self.attack, "seeded_by_example", False))

    @property
    def minimum_norm(self) -> bool:
        """Whether the attack looks for the smallest change, whatever eps."""
        return bool(getattr(self.attack, "minimum_norm", False))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return what the attack finds on the view of the model."""
        return self.attack(self.view(model).eval(), x, y, threat, generator=generator)
