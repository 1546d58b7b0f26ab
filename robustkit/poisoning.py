"""What the results say of poisoned training data, from what the steps stored. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.results import Poisoning, Rate, Tolerance

POISONS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""So many poisons a vote is asked about."""


def poisoning_of(fooled: NDArray[np.bool_] | None, fit: Mapping[str, Any]) -> Poisoning | None:
    """Return what the poison did: `fooled` (V,), whether each triggered image is taken for the target; None without.

    fit: the record of the training, which says what the variant's defenses removed.
    """
    if fooled is None:
        return None
    return Poisoning.model_validate({"success": _rate(fooled), **(fit.get("poison") or {})})


def tolerance_of(radius: NDArray[np.int64] | None, members: int) -> Tolerance | None:
    """Return the accuracy that is certain for growing numbers of poisons, of a vote of so many members.

    radius (N,): how many poisons cannot change the answer on each test image, -1 where that is wrong; None without.
    """
    if radius is None:
        return None
    poisons = [count for count in POISONS if 2 * count <= members]
    return Tolerance(members=members, poisons=poisons, accuracy=[_rate(radius >= count) for count in poisons])


def _rate(holds: NDArray[np.bool_]) -> Rate:
    return stats.clopper_pearson(int(holds.sum()), int(holds.size))
