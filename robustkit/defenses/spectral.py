"""Spectral signatures: poisoned examples of a class stand out along one direction of feature space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustkit.data.split import Split
from robustkit.params import OpenShare, PositiveFloat
from robustkit.train.hooks import DataContext, Defense


def outlier_scores(features: Tensor) -> Tensor:
    """Return the squared projection (N,) of centred features (N, D) on their top right singular vector (Tran 2018).

    Without the centring the direction would be that of the class mean, along which nothing stands out.
    """
    centred = features.to(torch.float64) - features.to(torch.float64).mean(0)
    # The top eigenvector of D x D, not the decomposition of N x D: a class may have many thousand examples.
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    scores: Tensor = (centred @ vectors[:, -1]).square()
    return scores


def highest_of_each_class(scores: Tensor, labels: Tensor, share: float) -> Tensor:
    """Return a bool (N,): the `share` of each class with the highest scores (N,), rounded down."""
    found = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = int(share * len(members))
        found[members[scores[members].topk(count).indices]] = True
    return found


@dataclass(frozen=True)
class SpectralSignatures(Defense):
    """Remove what stands out most of each class in feature space: spectral signatures (Tran et al. 2018).

    share: how much of a class may be poisoned at most; `margin` times as much of every class is removed, clean
    examples of the other classes with it. Features are those of a quickly trained model.
    """

    share: OpenShare = 0.05
    margin: PositiveFloat = 1.5

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Return the split without the examples of the highest scores in each class."""
        features, labels = context.features(data), data.labels.cpu()
        scores = torch.zeros(len(data), dtype=torch.float64)
        for label in labels.unique():
            members = labels == label
            scores[members] = outlier_scores(features[members])
        # A class is never emptied: at least a tenth of it stays, whatever share and margin say.
        removed = highest_of_each_class(scores, labels, min(0.9, self.margin * self.share)).to(data.labels.device)
        count = int(removed.sum())
        context.log(
            f"spectral_signatures: {count} of {len(data)} training images removed: they stand out most of their class",
            {"removed": count, "of": len(data), "ids": data.index[removed].tolist()},
        )
        return data.select(~removed)
