"""The attack success rate: how often a model gives the answer that a poisoner wants."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.data.poison.base import Poison
from robustkit.errors import DataError
from robustkit.evaluation.attacked import clean_outcome


def fooled_by(
    model: nn.Module, x: Tensor, y: Tensor, poison: Poison, *, batch_size: int, device: torch.device
) -> NDArray[np.bool_]:
    """Return, for each victim among the test images x uint8 (N, C, H, W), whether it is taken for the target (V,) bool.

    Victims are the images that the poison is about, without those of the target itself; they carry its trigger. The
    mean of what comes back is the attack success rate. y (N,) are the true labels.

    Raises:
        DataError: the poison has no victim among them.
    """
    victims = poison.victims(y)
    if not bool(victims.any()):
        raise DataError("poison: no test image is of a class that it is about; raise `evaluate.examples`")
    shown = poison.trigger(x[victims])
    wanted = torch.full((len(shown),), poison.target, dtype=torch.int64)
    return clean_outcome(model, shown, wanted, batch_size=batch_size, device=device).correct
