"""What fools a quantized model beside attacks on its surrogate: images of the float models, and queries.

Bernhard et al. 2019 (arXiv 1909.12741), Gupta & Ajanthan 2020 (arXiv 2003.13511): gradients of quantized models mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.attacks.gradient import Pgd
from robustkit.attacks.square import Square
from robustkit.attacks.threat import Attack, Threat
from robustkit.evaluation.attacked import AttackProgress, as_images, attack_outcome, predicted
from robustkit.evaluation.both import adaptive
from robustkit.evaluation.outcome import Outcome
from robustkit.models.wrapped import view_of

STEPS, RESTARTS = 40, 2
"""Of pgd on the float model."""


@dataclass(frozen=True)
class Beside:
    """How a quantized model stands up to images of float models, and then to queries."""

    transfer: Outcome
    square: Outcome
    """On what the attacks on the surrogate and the float models' images left: its `correct` withstands all of them."""
    asked: NDArray[np.bool_]
    """Which examples (N,) that were."""
    sets: int
    """How many sets of images of float models were tried."""
    disagreeing: int
    """Clean images that the surrogate classifies otherwise."""


@dataclass(frozen=True)
class _Stay:
    """Leaves images as they are: what is tried before it is all there is."""

    seeded_by_example: ClassVar[bool] = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        return x


@dataclass(frozen=True)
class Setting:
    """What every attack here has: images x (N, ...), labels y (N,), the budget, the seed and how to run."""

    x: Tensor
    y: Tensor
    threat: Threat
    seed: int
    batch_size: int
    device: torch.device
    quantize_input: bool = False
    on_progress: AttackProgress | None = None

    def attacked(
        self,
        model: nn.Module,
        attack: Attack,
        label: str,
        clean: Outcome,
        *,
        keep: int = 0,
        probes: Tensor | None = None,
    ) -> Outcome:
        """Return the outcome of an attack on the examples that are right in `clean`."""
        return attack_outcome(
            model,
            self.x,
            self.y,
            attack,
            self.threat,
            clean=clean,
            seed=self.seed,
            label=label,
            batch_size=self.batch_size,
            device=self.device,
            keep=keep,
            probes=probes,
            quantize_input=self.quantize_input,
            on_progress=self.on_progress,
        )


def beside_surrogate(
    model: nn.Module,
    floating: nn.Module,
    setting: Setting,
    *,
    clean: Outcome,
    surrogate: NDArray[np.bool_],
    crafted: Sequence[Tensor],
    queries: int,
) -> Beside:
    """Try on a quantized model what attacks on its surrogate may miss; the model itself judges all of it.

    floating: the float model that it was made of, which pgd is run on. crafted: images (N, ...) that fooled float
    variants. surrogate (N,): right under the attacks on the surrogate; `queries` an example go to what is then left.
    """
    pgd = adaptive(Pgd(steps=STEPS, restarts=RESTARTS, loss="margin"), floating)
    own = setting.attacked(floating, pgd, "float", clean, keep=len(setting.y))
    assert own.adversarial is not None
    transfer = replace(clean, forwards=own.forwards, backwards=own.backwards, seconds=own.seconds)
    sets = [own.adversarial, *crafted]
    for images in sets:
        transfer = _added(transfer, setting.attacked(model, _Stay(), "transfer", transfer, probes=images))
    left = replace(transfer, correct=surrogate & transfer.correct)
    square = setting.attacked(model, Square(n_queries=queries), "square", left)
    square = replace(square, correct=left.correct & square.correct)
    apart = disagreeing(model, setting.x, batch_size=setting.batch_size, device=setting.device)
    return Beside(transfer, square, left.correct, len(sets), apart)


def _added(before: Outcome, after: Outcome) -> Outcome:
    """Return what came after with the costs of both."""
    return replace(
        after,
        forwards=before.forwards + after.forwards,
        backwards=before.backwards + after.backwards,
        seconds=before.seconds + after.seconds,
        projected=before.projected + after.projected,
    )


@torch.no_grad()
def disagreeing(model: nn.Module, x: Tensor, *, batch_size: int, device: torch.device) -> int:
    """Return for how many clean images x (N, ...) a model and what attacks take in its place give different classes."""
    view = view_of(model)
    apart = torch.zeros((), dtype=torch.int64, device=device)
    for part in x.split(batch_size):
        images = as_images(part.to(device))
        apart += (predicted(model(images)) != predicted(view(images))).sum()
    return int(apart)
