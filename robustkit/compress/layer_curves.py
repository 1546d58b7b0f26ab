"""What a sensitivity scan found. Imports no torch."""

from __future__ import annotations

from typing import Any

from robustkit.records.fields import Count, Name, Record, Share
from robustkit.results import Rate


class LayerCurve(Record):
    """Accuracies, as fractions of 1, with one layer alone pruned: one entry a sparsity of the scan."""

    name: Name
    """The weight's name, or that of the first layer of a group of channels."""
    size: Count
    """Weights, or channels."""
    clean: list[Share]
    attacked: list[Share]

    def bears(self, sparsities: list[float], attacked: float, points: float) -> float:
        """Return the largest sparsity up to which attacked accuracy stays within `points` of 1 of `attacked`; or 0."""
        borne = 0.0
        for sparsity, accuracy in sorted(zip(sparsities, self.attacked, strict=True)):
            if accuracy < attacked - points:
                break
            borne = sparsity
        return borne


class Sensitivity(Record):
    """A scan: clean and attacked accuracy of the model as it is, and of each layer pruned alone."""

    method: Name
    threat: dict[str, Any]
    sparsities: list[Share]
    clean: Rate
    attacked: Rate
    layers: list[LayerCurve]
