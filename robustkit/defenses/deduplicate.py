"""Repeated images: removed from the training data, reported where the test split holds them too."""

from __future__ import annotations

from dataclasses import dataclass

from robustkit.data.split import Split
from robustkit.defenses.duplicates import find_duplicates
from robustkit.params import Fraction
from robustkit.train.hooks import DataContext, Defense


@dataclass(frozen=True)
class Deduplicate(Defense):
    """Remove repeated training images, exact and near ones, and report training images that the test split holds too.

    near: also remove images whose correlation with an earlier one is at least `similarity`, whatever
    their brightness and contrast.
    """

    near: bool = True
    similarity: Fraction = 0.99

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return the split without repetitions; the first image of each group stays."""
        found = find_duplicates(data.images, similarity=self._similarity, device=context.device)
        repeated = found.repeated.to(data.labels.device)
        conflicts = repeated & (data.labels != data.labels[found.of.clamp_min(0).to(data.labels.device)])
        removed, exact, relabelled = int(repeated.sum()), int(found.exact.sum()), int(conflicts.sum())
        context.log(
            f"deduplicate: {removed} of {len(data)} training images repeat an earlier one and were removed "
            f"({exact} exact, {removed - exact} near; {relabelled} with another label)",
            {
                "removed": removed,
                "of": len(data),
                "exact": exact,
                "near": removed - exact,
                "different_label": relabelled,
                "ids": data.index[repeated].tolist(),
            },
        )
        if context.test is not None:
            self._report_leaks(data, context.test, context)
        return data.select(~repeated)

    @property
    def _similarity(self) -> float | None:
        return self.similarity if self.near else None

    def _report_leaks(self, data: Split, test: Split, context: DataContext) -> None:
        found = find_duplicates(
            test.images.to(data.images.device), similarity=self._similarity, among=data.images, device=context.device
        )
        leaked = found.repeated
        leaks, exact = int(leaked.sum()), int(found.exact.sum())
        context.log(
            f"deduplicate: {leaks} of {len(test)} test images are in the training data too "
            f"({exact} exact, {leaks - exact} near); reported only",
            {
                "leaks": leaks,
                "of": len(test),
                "exact": exact,
                "near": leaks - exact,
                "test_ids": test.index[leaked.to(test.index.device)].tolist(),
                "ids": data.index[found.of[leaked].to(data.index.device)].tolist(),
            },
        )
