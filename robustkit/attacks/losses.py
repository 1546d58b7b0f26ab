"""What an attack maximises: one number an example, larger is closer to success."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["margin", "ce"]


PROBABILITY_SLACK = 1e-4
DLR_FLOOR = 1e-12


def as_logits(outputs: Tensor) -> Tensor:
    """Return outputs (N, classes) with rows that are probabilities replaced by their logarithms.

    The order of the classes stays. The margin of probabilities has no gradient where the softmax saturates, that of
    their logarithms has one (Carlini & Wagner 2016, arXiv 1607.04311, on distillation).
    """
    lowest, sums = outputs.detach().amin(1, keepdim=True), outputs.detach().sum(1, keepdim=True)
    shares = (lowest >= 0) & ((sums - 1).abs() < PROBABILITY_SLACK)
    return torch.where(shares, outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log(), outputs)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the best wrong logit minus the logit of y (N,): positive where the example is fooled.

    Its gradient does not vanish where the softmax saturates (Carlini & Wagner 2017, arXiv 1608.04644, f6).
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    return wrong - own


def soft_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the log of the summed exponentials of the wrong logits minus the logit of y (N,).

    The cross-entropy is its softplus: the gradient has the same direction, but does not vanish on sure models.
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], float("-inf")).logsumexp(1) - own


def margin_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the logit of the class `target` (N,) minus the logit of y (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def wrong_classes(logits: Tensor, y: Tensor) -> Tensor:
    """Return the wrong classes of each example, the likeliest first (N, classes - 1)."""
    return logits.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy (N,) in nats."""
    return functional.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (N,): the margin over the gap between first and third logit.

    Scaling or shifting the logits changes nothing (Croce & Hein 2020, arXiv 2003.01690, equation 6). With two classes
    there is no third logit: the margin itself comes back.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + DLR_FLOOR)


def dlr_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio (N,) (Croce & Hein 2020, equation 7).

    With fewer than four classes there is no fourth logit: the margin to the target over the largest gap comes back.
    """
    aim = margin_to(logits, y, target)
    if logits.shape[1] < 3:
        return aim
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return aim / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + DLR_FLOOR)


LOSSES = {"margin": margin, "ce": cross_entropy}
