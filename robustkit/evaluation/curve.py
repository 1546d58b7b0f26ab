"""Security curves: accuracy against a growing budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.attacks.engine import Allowed
from robustkit.attacks.threat import Attack, Norm, Threat
from robustkit.evaluation.attacked import FASTEST, attack_outcome
from robustkit.evaluation.outcome import Outcome


def security_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    norm: Norm,
    eps: Sequence[float],
    *,
    clean: Outcome,
    seed: int,
    batch_size: int,
    device: torch.device,
    quantize_input: bool = False,
    allowed: Allowed = FASTEST,
) -> list[int]:
    """Return how many examples are still right at each eps, in the order given.

    An example that is fooled at a small eps counts as fooled at every larger one, and is not attacked again.
    """
    broken = broken_at(
        model,
        x,
        y,
        attack,
        norm,
        eps,
        clean=clean,
        seed=seed,
        batch_size=batch_size,
        device=device,
        quantize_input=quantize_input,
        allowed=allowed,
    )
    return [int(np.count_nonzero(broken > budget)) for budget in eps]


def broken_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    norm: Norm,
    eps: Sequence[float],
    *,
    clean: Outcome,
    seed: int,
    batch_size: int,
    device: torch.device,
    quantize_input: bool = False,
    allowed: Allowed = FASTEST,
) -> NDArray[np.float64]:
    """Return, for each example (N,), the smallest of the eps at which the attack fools it.

    0 where the model is wrong without an attack, infinity where no eps was enough: accuracy at eps is
    `(broken > eps).mean()`. The security curve of Biggio & Roli 2018 (arXiv 1712.03141, section 4).

    Raises:
        UsageError: a negative eps.
    """
    broken = np.where(clean.correct, np.inf, 0.0)
    alive = clean
    for budget in sorted(set(eps) - {0.0}):
        alive = attack_outcome(
            model,
            x,
            y,
            attack,
            Threat(norm, budget),
            clean=alive,
            seed=seed,
            label=f"curve {budget:.9g}",
            batch_size=batch_size,
            device=device,
            quantize_input=quantize_input,
            allowed=allowed,
        )
        broken[np.isinf(broken) & ~alive.correct] = budget
    return broken
