"""How far away the closest adversarial images are: medians and whole security curves from one run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustkit.results import Distances

RELATIVE_SLACK = 1e-4
ABSOLUTE_SLACK = 1e-6
"""What a distance may be beyond eps by rounding: eps (1 + 1e-4) + 1e-6."""
POINTS = 101
"""A curve has at most so many points, at the quantiles of the distances."""


@dataclass(frozen=True)
class MinimumDistances:
    """The smallest distance at which an attack fooled each example.

    `values` (N,): 0 where the model is wrong without an attack, infinite where nothing was found. They are upper
    bounds: a better attack may find closer images.
    """

    norm: str
    values: NDArray[np.float32]

    @property
    def median(self) -> float:
        """The eps at which half of all examples are fooled; infinite where fewer were."""
        return float(np.sort(self.values)[(len(self.values) - 1) // 2])

    @property
    def found(self) -> float:
        """The share of the examples that the model gets right for which an adversarial image was found; 1 of none."""
        right = self.values > 0
        return float(np.isfinite(self.values[right]).mean()) if right.any() else 1.0

    def accuracy(self, eps: float) -> float:
        """Return the accuracy under this attack at any eps, with the slack for rounding that attacks are given."""
        return float(np.mean(self.values > eps * (1 + RELATIVE_SLACK) + ABSOLUTE_SLACK))

    def curve(self) -> tuple[list[float], list[float]]:
        """Return (eps, accuracy): the security curve, at 0 and at the distances or their quantiles."""
        finite = np.sort(self.values[np.isfinite(self.values)]).astype(np.float64)
        if len(finite) > POINTS:
            finite = np.quantile(finite, np.linspace(0, 1, POINTS), method="higher")
        eps = np.unique(np.concatenate([[0.0], finite]))
        return [float(one) for one in eps], [float(np.mean(self.values > one)) for one in eps]

    def summary(self) -> Distances:
        """Return what results.json says of the distances."""
        eps, accuracy = self.curve()
        return Distances(
            norm=self.norm,
            median=self.median if np.isfinite(self.median) else None,
            found=self.found,
            n=len(self.values),
            eps=eps,
            accuracy=accuracy,
        )

    def __repr__(self) -> str:
        return f"{self.norm} distances of {len(self.values)} examples: median {self.median:.4g}, found {self.found:.1%}"
