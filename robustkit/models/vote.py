"""Several networks that answer by a vote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

TIE = 1e-3
"""What a class loses for each class before it, so that a tie goes to the first: less than a vote over all classes."""


class Vote(nn.Module):
    """Networks of one number of classes, of which each has a vote; ties go to the class with the lower number.

    The output (N, classes) counts the votes. Its gradient is that of the members' summed probabilities (a straight-
    through estimate), since counts have none: attacks see through the vote, and are judged by it.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the votes (N, classes) of images (N, C, H, W), less than a vote taken off for ties."""
        logits = torch.stack([member(x) for member in self.members])
        soft = logits.softmax(2).sum(0)
        counts = counted(logits).to(soft.dtype)
        return counts - TIE / counts.shape[1] * torch.arange(counts.shape[1], device=x.device) + (soft - soft.detach())

    def votes(self, x: Tensor) -> Tensor:
        """Return how many members vote for each class, (N, classes) int64."""
        return counted(torch.stack([member(x) for member in self.members]))


def counted(logits: Tensor) -> Tensor:
    """Return the votes (N, classes) int64 of logits (members, N, classes)."""
    return functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)


def tolerated(votes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the winners (N,) of votes (N, classes) int64, and how many changed members (N,) none of them loses to.

    A changed member takes its vote from the winner and gives it to another class, which wins a tie where its number
    is lower: floor((first - max over the others of (count + [lower number])) / 2) (Levine & Feizi 2021, theorem 1).
    """
    classes = torch.arange(votes.shape[1], device=votes.device)
    # The first of equal counts wins: a lower number counts for more than nothing, and less than a vote.
    winner = (votes * votes.shape[1] - classes).argmax(1)
    first = votes.gather(1, winner[:, None])
    others = votes + (classes < winner[:, None]).long()
    others = others.scatter(1, winner[:, None], -1)
    gap = first.squeeze(1) - others.amax(1)
    return winner, torch.div(gap, 2, rounding_mode="floor")
