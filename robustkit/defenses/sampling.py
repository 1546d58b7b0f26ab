"""Data sampling: which training examples are used, and how often. Against poisoned and noisy data, not against Linf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustkit.data.split import Split
from robustkit.defenses.neighbours import inconsistent, nearest, spare_emptied_classes, votes
from robustkit.errors import UsageError
from robustkit.params import Fraction, OpenShare, PositiveInt
from robustkit.train.hooks import DataContext, Defense


def inverse_frequency(labels: Tensor, strength: float = 1.0, beta: float = 1.0) -> Tensor:
    """Return sampling weights (N,) for labels (N,): effective(class) ** -strength, scaled to a mean of 1.

    The effective number of a class with n examples is (1 - beta ** n) / (1 - beta) (Cui et al. 2019); with beta 1 it
    is n, with beta 0 it is 1. With strength 1 and beta 1 every class is drawn equally often; with strength or beta 0
    the data is drawn as it is.
    """
    counts = torch.bincount(labels).to(torch.float64)
    if 0 < beta < 1:
        # 1 - beta ** n without the loss of digits where beta is next to 1.
        counts = torch.expm1(counts * math.log(beta)) / (beta - 1)
    elif beta == 0:
        counts = counts.clamp_max(1)
    # A class without examples has no weight to give: whatever it gets is never looked up.
    weights = counts.where(counts > 0, 1.0).pow(-strength)[labels]
    return weights / weights.mean()


@dataclass(frozen=True)
class BalancedSampling(Defense):
    """Draw every class equally often, by inverse frequency or by effective number (Cui et al. 2019).

    strength in [0, 1]: 1 balances fully, 0 not at all. beta in [0, 1]: with 1 a class weighs 1 / n, below it
    (1 - beta) / (1 - beta^n), as further examples of a large class bring ever less that is new.
    """

    strength: Fraction = 1.0
    beta: Fraction = 1.0

    def sample_weights(self, labels: Tensor, context: DataContext) -> Tensor:
        """Return the weight of each example (N,)."""
        weights = inverse_frequency(labels, self.strength, self.beta)
        counts = torch.bincount(labels)
        counts = counts[counts > 0]
        smallest, largest = int(counts.min()), int(counts.max())
        context.log(
            f"balanced_sampling: classes hold {smallest} to {largest} training images",
            {"classes": len(counts), "smallest": smallest, "largest": largest},
        )
        return weights


def random_part(labels: Tensor, share: float, generator: torch.Generator, *, per_class: bool = False) -> Tensor:
    """Return a bool (N,) of a random `share` of the labels (N,), of each class or of all; at least one of each."""
    kept = torch.zeros(len(labels), dtype=torch.bool)
    groups = [(labels == label).nonzero().squeeze(1) for label in labels.unique()] if per_class else [None]
    for members in groups:
        positions = torch.arange(len(labels)) if members is None else members
        order = torch.randperm(len(positions), generator=generator)
        kept[positions[order[: max(1, round(share * len(positions)))]]] = True
    return kept


@dataclass(frozen=True)
class Subsample(Defense):
    """Train on a random share of the data: fewer poisons as well, and the control that every filter must beat.

    per_class: the same share of each class, not of the data as a whole.
    """

    share: OpenShare = 0.5
    per_class: bool = False

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return a part of the split, drawn by the variant's seed."""
        kept = random_part(data.labels.cpu(), self.share, context.generator, per_class=self.per_class)
        context.log(
            f"subsample: {int(kept.sum())} of {len(data)} training images are used",
            {"kept": int(kept.sum()), "removed": int((~kept).sum()), "of": len(data)},
        )
        return data.select(kept)


@dataclass(frozen=True)
class KnnFilter(Defense):
    """Remove training images whose label the k nearest neighbours contradict (deep k-NN, Peri et al. 2019).

    An image goes when another label has more votes than its own and at least the share `agreement` of all k.
    features: `probe` compares features of a quickly trained model, `pixels` the images themselves.
    A class that would be emptied is left as it is.
    """

    k: PositiveInt = 10
    agreement: Fraction = 0.7
    features: Literal["probe", "pixels"] = "probe"

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return the split without the images that the neighbours contradict."""
        if len(data) <= self.k:
            raise UsageError(f"knn_filter: k is {self.k}, and there are only {len(data)} training images")
        features = context.features(data) if self.features == "probe" else pixel_features(data)
        features, labels = features.to(context.device), data.labels.to(context.device)
        classes = int(labels.max()) + 1
        counts = votes(labels, nearest(features, self.k), classes)
        removed = inconsistent(labels, counts, self.agreement)
        removed, spared = spare_emptied_classes(labels, removed, classes)
        removed = removed.to(data.labels.device)
        count = int(removed.sum())
        kept = f"; classes {spared.tolist()} left as they are" if len(spared) else ""
        context.log(
            f"knn_filter: {count} of {len(data)} training images removed: their neighbours carry another label{kept}",
            {
                "removed": count,
                "of": len(data),
                "spared_classes": spared.tolist(),
                "ids": data.index[removed].tolist(),
            },
        )
        return data.select(~removed)


def pixel_features(data: Split) -> Tensor:
    """Return the images as rows (N, D), each with its mean taken off."""
    flat = data.images.flatten(1).to(torch.float32)
    return flat - flat.mean(1, keepdim=True)
