"""`robustkit.minimum_distances`: how far away is the closest adversarial image of each example?"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.attacks.threat import Norm, Threat
from robustkit.errors import UsageError
from robustkit.evaluation.asked import Model, as_module, checked_examples
from robustkit.evaluation.attacked import attack_outcome, clean_outcome, device_of
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.specs import AttackSpec, make_attacks

DEFAULT_ATTACKS: dict[str, str] = {"linf": "fmn", "l2": "ddn", "l1": "pdpgd", "l0": "sigma_zero"}


def minimum_distances(
    model: Model,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    norm: Norm = "linf",
    *,
    attack: AttackSpec | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> MinimumDistances:
    """Return how far the closest adversarial image of each example is, as far as an attack finds it.

    Arguments are those of `evaluate`. `attack`: one minimum-norm attack, by default fmn under linf, ddn under l2, pdpgd
    under l1 and sigma_zero under l0. The result has `values` (N,), `median`, `found`, `accuracy(eps)` and `curve()`.

    Raises:
        UsageError: images outside [0, 1], labels that do not fit, an attack that looks for no distances.
        ModelError, AttackError: as `evaluate`.
    """
    made = make_attacks([attack if attack is not None else DEFAULT_ATTACKS.get(norm, "fmn")])
    ((label, (name, chosen)),) = made.items()
    if not getattr(chosen, "minimum_norm", False):
        known = ", ".join(DEFAULT_ATTACKS.values())
        raise UsageError(f"{name} looks for any change within eps, not for the smallest: use one of {known}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    with torch.inference_mode(False):
        threat = Threat(norm, 0.0)
        images, labels = checked_examples(x, y, threat)
        module = as_module(model)
        device = device_of(module, images.device)
        clean = clean_outcome(module, images, labels, batch_size=batch_size, device=device)
        outcome = attack_outcome(
            module,
            images,
            labels,
            chosen,
            threat,
            clean=clean,
            seed=seed,
            label=label,
            batch_size=batch_size,
            device=device,
        )
    assert outcome.minimal_distance is not None
    return MinimumDistances(norm, outcome.minimal_distance)
