"""Activation clustering: the features of a poisoned class fall into two clusters, one of them small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from torch import Tensor

from robustkit.data.split import Split
from robustkit.params import Fraction, OpenShare, PositiveInt
from robustkit.train.hooks import DataContext, Defense

_STARTS = 8
_SILHOUETTE = 1000
LEAST = 10
"""A class with fewer examples is not looked at."""


def whitened(features: Tensor, dimensions: int) -> Tensor:
    """Return features (N, D) as their first principal components (N, at most `dimensions`), each of variance 1.

    Independent components, which the paper takes, are a rotation of these; distances, and so clusters, are the same.
    """
    centred = features.to(torch.float64) - features.to(torch.float64).mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(centred) - 1))
    # Directions in which nothing varies would be noise blown up.
    kept = (values > 1e-9 * values[-1].clamp_min(1e-30)).nonzero().squeeze(1)[-dimensions:]
    points: Tensor = centred @ vectors[:, kept] / values[kept].sqrt()
    return points


def two_means(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cluster (N,) of each point (N, D), False or True: 2-means, the best of several starts (Lloyd 1982)."""
    if not bool((points != points[0]).any()):
        return torch.zeros(len(points), dtype=torch.bool)
    means = KMeans(2, n_init=_STARTS, random_state=_seed(generator))
    return torch.from_numpy(means.fit_predict(points.numpy()) == 1)


def silhouette(points: Tensor, assigned: Tensor, generator: torch.Generator) -> float:
    """Return the mean silhouette of two clusters of points (N, D), over at most 1,000 of them (Rousseeuw 1987).

    In [-1, 1]; 0 where a cluster is empty or a single point.
    """
    chosen = torch.randperm(len(points), generator=generator)[:_SILHOUETTE]
    points, assigned = points[chosen], assigned[chosen]
    if min(int((~assigned).sum()), int(assigned.sum())) < 2:
        return 0.0
    return float(silhouette_score(points.numpy(), assigned.numpy()))


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


@dataclass(frozen=True)
class ActivationClustering(Defense):
    """Remove the smaller of two clusters of a class where it is small and apart: activation clustering (Chen 2018).

    dimensions: of the features that are clustered. A class loses its smaller cluster where that holds less than
    `smaller` of it and the silhouette of the two is at least `apart`; a clean class falls into halves.
    """

    dimensions: PositiveInt = 10
    smaller: OpenShare = 0.35
    apart: Fraction = 0.2

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return the split without the clusters that look planted."""
        features, labels = context.features(data), data.labels.cpu()
        removed = torch.zeros(len(data), dtype=torch.bool)
        suspected = []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().squeeze(1)
            cluster = self._planted(features[members], context.generator)
            if cluster is not None:
                removed[members[cluster]] = True
                suspected.append(label)
        removed = removed.to(data.labels.device)
        count = int(removed.sum())
        context.log(
            f"activation_clustering: {count} of {len(data)} training images removed: a small cluster of the classes "
            f"{suspected}",
            {"removed": count, "of": len(data), "classes": suspected, "ids": data.index[removed].tolist()},
        )
        return data.select(~removed)

    def _planted(self, features: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return which examples of a class (N,) are in a cluster that looks planted; None where none does."""
        if len(features) < LEAST:
            return None
        points = whitened(features, self.dimensions)
        assigned = two_means(points, generator)
        small = assigned if 2 * int(assigned.sum()) <= len(assigned) else ~assigned
        if not 0 < int(small.sum()) < self.smaller * len(small):
            return None
        return small if silhouette(points, small, generator) >= self.apart else None
