"""Security curves: accuracy against a growing budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Attack, Norm, Threat
from robustkit.evaluate.attacked import attack_outcome
from robustkit.evaluate.outcome import Outcome


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
) -> list[int]:
    """Return how many examples are still right at each eps, in the order given.

    An example that is fooled at a small eps counts as fooled at every larger one, and is not attacked again.
    """
    alive = clean
    counts: dict[float, int] = {}
    for budget in sorted(set(eps)):
        if budget > 0:
            label = f"curve {budget:.9g}"
            alive = attack_outcome(
                model,
                x,
                y,
                attack,
                Threat(norm, budget),
                clean=alive,
                seed=seed,
                label=label,
                batch_size=batch_size,
                device=device,
            )
        counts[budget] = int(np.count_nonzero(alive.correct))
    return [counts[budget] for budget in eps]
