"""Disjoint parts of the training data, a network on each: a poisoned example reaches one vote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustkit.data.arrays import stratified
from robustkit.data.load import VALIDATION_SEED, channel_statistics
from robustkit.data.split import Dataset, split_of
from robustkit.defenses.duplicates import hashes
from robustkit.errors import UsageError
from robustkit.params import PositiveInt
from robustkit.train.hooks import Defense


def part_of(images: Tensor, parts: int) -> Tensor:
    """Return the part (N,) in 0..parts - 1 of each uint8 image (N, C, H, W), by its bytes and by nothing else."""
    keys = hashes(images)
    # The upper half into the lower one: the last bits of a sum of products are not mixed.
    return torch.remainder(keys ^ (keys >> 31), parts)


def parted(data: Dataset, parts: int, validation: float) -> list[Dataset]:
    """Return `parts` data sets, each with its own training and validation split and statistics.

    An example of one part, added, removed or relabelled, changes nothing of another: parts are drawn by content from
    the training and the validation split together, sorted by content, and held out within each part.

    Raises:
        UsageError: a part is too small to train on.
    """
    images = torch.cat([data.train.images, data.validation.images])
    labels = torch.cat([data.train.labels, data.validation.labels])
    known = data.poisoned is not None and data.held_out_poisoned is not None
    mask = torch.cat([data.poisoned, data.held_out_poisoned]) if known else None  # type: ignore[list-item]
    part, order = part_of(images, parts), labels.argsort(stable=True)
    order = order[hashes(images)[order].argsort(stable=True)]
    found = []
    for number in range(parts):
        members = order[part[order] == number]
        kept, cut = stratified(labels[members].numpy().astype(np.int64), validation, VALIDATION_SEED)
        if len(kept) < 2 or not len(cut):
            raise UsageError(
                f"partition_ensemble: of {len(labels)} training images part {number + 1} of {parts} gets "
                f"{len(members)}, too few to train on; take fewer parts"
            )
        train, held = members[torch.from_numpy(kept)], members[torch.from_numpy(cut)]
        split = split_of(images[train], labels[train])
        mean, std = channel_statistics(split)
        rest = split_of(images[held], labels[held])
        truth = (None, None) if mask is None else (mask[train], mask[held])
        found.append(Dataset(split, rest, data.test, data.classes, data.fingerprint, mean, std, *truth))
    return found


@dataclass(frozen=True)
class PartitionEnsemble(Defense):
    """Train a network on each of disjoint parts of the data and let them vote: DPA (Levine & Feizi 2021).

    parts: how many. Each is drawn by the content of the images. An example that is added, removed or relabelled
    changes one part and so one vote; the report says how many such changes cannot change an answer, image by image.
    """

    parts: PositiveInt = 10

    def partition(self, data: Dataset, validation: float) -> list[Dataset]:
        """Return the parts."""
        return parted(data, self.parts, validation)
