"""The 1,797 real handwritten digits that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robustkit.data.arrays import Arrays, names_of, stratified
from robustkit.params import PositiveInt

TEST_SHARE = 0.25
SPLIT_SEED = 8


@dataclass(frozen=True)
class Digits:
    """8x8 handwritten digits, 10 classes, embedded: 1,347 to train on and 450 to test."""

    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the digits as uint8 (N, 1, 8, 8); a fixed stratified quarter is the test split."""
        from sklearn.datasets import load_digits

        found = load_digits()
        images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
        labels = found.target.astype(np.int64)
        train, test = stratified(labels, TEST_SHARE, SPLIT_SEED)
        return Arrays(images[train], labels[train], images[test], labels[test], names_of(10))

    def fingerprint(self) -> str:
        """Return the name of the data: they come inside the library."""
        return "sklearn-digits-1797/quarter"
