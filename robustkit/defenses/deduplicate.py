"""Repeated images: removed from the training data, reported where the test split holds them too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustkit.data.split import Split
from robustkit.defenses.duplicates import Duplicates, directions, find_duplicates, near_matches
from robustkit.params import Fraction
from robustkit.train.hooks import DataContext, Defense


@dataclass(frozen=True)
class Deduplicate(Defense):
    """Remove repeated training images, exact and near ones, and report training images that the test split holds too.

    near: also remove images whose correlation with an earlier one is at least `similarity`, whatever
    their brightness and contrast. embedding: also remove images whose features, those of a quickly trained model
    without their mean, have at least this cosine with an earlier one's; such a model sees much of a class alike, so
    that less than 0.999 takes different images for one.
    """

    near: bool = True
    similarity: Fraction = 0.99
    embedding: Fraction | None = None

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return the split without repetitions; the first image of each group stays."""
        found = self._repeated(data, None, context)
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

    def _repeated(self, data: Split, test: Split | None, context: DataContext) -> Duplicates:
        """Return what repeats earlier images of the data, or what of the test split repeats any of them."""
        looked, among = data if test is None else test, None if test is None else data
        found = find_duplicates(
            looked.images.to(data.images.device),
            similarity=self.similarity if self.near else None,
            among=among.images if among else None,
            device=context.device,
        )
        if self.embedding is None:
            return found
        features = context.features(data).to(context.device, torch.float32)
        mean = features.mean(0)
        known = directions(features, mean)
        if among is None:
            return found.with_near(near_matches(known, self.embedding))
        shown = directions(context.features(looked).to(context.device), mean)
        return found.with_near(near_matches(shown, self.embedding, known))

    def _report_leaks(self, data: Split, test: Split, context: DataContext) -> None:
        found = self._repeated(data, test, context)
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
