"""How much of an inference wrapper's robustness survives the adaptive view. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.results import Adaptive

Bools = NDArray[np.bool_]


def adaptive_of(clean: Bools, ways: Sequence[tuple[Bools, Bools]]) -> Adaptive | None:
    """Return the worst cases over all attacks, each a pair of what is right (as deployed, through the view)."""
    if not ways:
        return None
    naive = stats.worst_case([clean, *(one for one, _ in ways)])
    adaptive = stats.worst_case([clean, *(one for _, one in ways)])
    return Adaptive(
        naive=stats.clopper_pearson(int(naive.sum()), int(naive.size)),
        adaptive=stats.clopper_pearson(int(adaptive.sum()), int(adaptive.size)),
    )


def adaptive_notes(clean: Bools, ways: Sequence[tuple[Bools, Bools]]) -> list[str]:
    """Return what the report says of them; nothing for a variant without wrappers."""
    found = adaptive_of(clean, ways)
    return [] if found is None else [str(found)]
