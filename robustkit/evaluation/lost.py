"""What one attack finds and another misses, example by example. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 2
"""One example more or less is chance."""


def lost_examples(before: NDArray[np.bool_], after: NDArray[np.bool_], least: float) -> tuple[int, float] | None:
    """Return how many examples (N,) right before are fooled after, and their share of all, if more than `least`."""
    lost = int(np.count_nonzero(before & ~after))
    share = lost / max(1, before.size)
    return (lost, share) if lost >= LEAST and share > least else None
