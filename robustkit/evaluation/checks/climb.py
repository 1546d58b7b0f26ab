"""At which step of an attack each example falls: one climb answers for every number of steps up to its own."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.gradient import default_step
from robustkit.attacks.losses import LOSSES, LossName
from robustkit.attacks.search import Search
from robustkit.attacks.threat import Threat
from robustkit.evaluation.checks.batch import Batch

NEVER = 2**30


def falls_at(batch: Batch, loss: LossName, steps: int, start: Tensor, threat: Threat) -> Tensor:
    """Return the step after which each example is fooled first (N,): 0 at the start itself, NEVER if not at all.

    `start` (N, ...) are the images that the climb begins with. 2 * steps + 1 passes an example that is not fooled.

    Raises:
        AttackError: the model's output has no gradient.
    """
    search = Search(batch.model, batch.x, batch.y, threat)
    at = torch.zeros(len(batch.y), dtype=torch.int64, device=batch.x.device)

    def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
        # Only those are asked for their score that the images after `number` steps do not fool.
        at[index] = number + 1
        return LOSSES[loss](logits, batch.y[index])

    # The step of the first ten must be the one that longer climbs take too.
    lengths = [threat.eps_for(batch.x).flatten() * default_step(10)] * steps
    at[search.climb(start, search.everyone, score, lengths)] = NEVER
    return at
