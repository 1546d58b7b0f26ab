"""What one attack did to one model, example by example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustkit import stats
from robustkit.results import Rate


@dataclass
class Outcome:
    """One entry an example, in the order of the test data; costs are examples summed over all calls."""

    correct: NDArray[np.bool_]
    """Whether the model is still right."""
    prediction: NDArray[np.int64]
    """-1 where the logits without an attack are not finite: such an example is wrong."""
    distance: NDArray[np.float32]
    """Distance of the image that the attack returned, in the threat's norm, also where it did not count.

    0 for examples that were not attacked.
    """
    forwards: int
    backwards: int
    seconds: float
    projected: int = 0
    """Results that left the ball or were not finite, and so did not count.

    A minimum-norm attack has no ball to leave: of its results those count here that are no images.
    """
    not_finite: int = 0
    """Examples whose logits were not finite: wrong without an attack, not fooled by one."""
    minimal_distance: NDArray[np.float32] | None = None
    """Of a minimum-norm attack: the distance of the image that fooled the model, at whatever eps.

    0 where the model is wrong without an attack, infinite where the attack found nothing.
    """
    silent: int = 0
    """Examples that the attack had fooled on its way, but not with the image that it returned; where it can be seen."""
    adversarial: Tensor | None = None
    """The adversarial images of the first examples, where they were asked for."""

    @property
    def rate(self) -> Rate:
        """Accuracy with its interval."""
        return stats.clopper_pearson(int(self.correct.sum()), int(self.correct.size))
