"""How many poisoned training examples a vote tolerates, image by image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.evaluation.attacked import as_images
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.models.vote import Vote, tolerated


def tolerance(
    model: Vote, x: Tensor, y: Tensor, *, batch_size: int, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return how many poisons cannot change the answer on each image (N,), and whether that answer is right (N,).

    x (N, C, H, W) uint8 or floats in [0, 1], y (N,). A poison is an example that is added to the training data, taken
    out of them or relabelled. Holds where each member depends on its own part of the data alone.
    """
    radii, right = [], []
    with undisturbed(model), torch.no_grad():
        for first in range(0, len(y), batch_size):
            votes = model.votes(as_images(x[first : first + batch_size].to(device)))
            winner, radius = tolerated(votes)
            radii.append(radius.cpu())
            right.append((winner == y[first : first + batch_size].to(device)).cpu())
    return torch.cat(radii).numpy(), torch.cat(right).numpy()
