"""AutoAttack on a random subset of what the other attacks left: how much did they miss?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import stats
from robustkit.attacks.autoattack import AutoAttack
from robustkit.attacks.engine import Allowed
from robustkit.attacks.threat import Attack, Threat
from robustkit.evaluation.attacked import FASTEST, AttackProgress, attack_outcome
from robustkit.evaluation.both import adaptive
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.seen import Checkpoint
from robustkit.results import Audit
from robustkit.seeding import derive_seed

STANDARD = AutoAttack()


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    survivors: NDArray[np.bool_],
    count: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    attack: Attack = STANDARD,
    quantize_input: bool = False,
    allowed: Allowed = FASTEST,
    on_progress: AttackProgress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Audit:
    """Run AutoAttack-standard on `count` random survivors, or on all where there are fewer.

    x (N, ...), y (N,), survivors (N,): right under every attack so far. The bounds on how many of all survivors would
    fall are exact, of the hypergeometric distribution: examples are drawn without replacement. A model with inference
    wrappers is attacked through its view.
    """
    chosen = sample(survivors, count, seed)
    before = Outcome(
        correct=chosen,
        prediction=y.cpu().numpy().astype(np.int64),
        distance=np.zeros(len(y), dtype=np.float32),
        forwards=0,
        backwards=0,
        seconds=0.0,
    )
    outcome = attack_outcome(
        model,
        x,
        y,
        adaptive(attack, model),
        threat,
        clean=before,
        seed=seed,
        label="audit",
        batch_size=batch_size,
        device=device,
        quantize_input=quantize_input,
        allowed=allowed,
        on_progress=on_progress,
        checkpoint=checkpoint,
    )
    left, examined = int(survivors.sum()), int(chosen.sum())
    broken = int((chosen & ~outcome.correct).sum())
    low, high = stats.hypergeometric(broken, examined, left)
    return Audit(
        n=len(y),
        survivors=left,
        examined=examined,
        broken=broken,
        low=low,
        high=high,
        forwards=outcome.forwards,
        backwards=outcome.backwards,
        seconds=outcome.seconds,
    )


def sample(survivors: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.bool_]:
    """Return `count` of the survivors (N,) at random, or all of them where there are fewer."""
    there = np.flatnonzero(survivors)
    chosen = np.zeros_like(survivors)
    generator = np.random.default_rng(derive_seed(seed, "audit"))
    chosen[generator.permutation(there)[:count]] = True
    return chosen
