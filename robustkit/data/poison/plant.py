"""Poison in the arrays of a source: in the training images alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit import registry
from robustkit.data.arrays import Arrays
from robustkit.data.poison.base import Poison
from robustkit.errors import DataError
from robustkit.recipe.spec import Use


def poison_of(use: Use, folder: Path | None = None, plugins: Sequence[Path] = ()) -> Poison:
    """Return the poison that a recipe names."""
    return cast(
        Poison, registry.create(registry.find("poison", use.name, folder=folder, plugins=plugins), use.parameters)
    )


def planted(poison: Poison, arrays: Arrays) -> tuple[Arrays, NDArray[np.bool_]]:
    """Return the arrays with poisoned training data, and a bool (N,) of the training examples that are poisoned.

    Raises:
        DataError: the data cannot be poisoned in this way.
    """
    images = torch.from_numpy(np.array(arrays.train_images))
    labels = torch.from_numpy(np.array(arrays.train_labels))
    found = poison.plant(images, labels, len(arrays.classes))
    if found.images.shape != images.shape or found.images.dtype != torch.uint8 or len(found.mask) != len(labels):
        raise DataError(f"poison {type(poison).__name__}: its images or its mask are not of the form they came in")
    changed = replace(arrays, train_images=found.images.numpy(), train_labels=found.labels.numpy())
    return changed, found.mask.numpy()
