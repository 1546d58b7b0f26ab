"""What an attack maximises: one number an example, larger is closer to success."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

LossName = Literal["margin", "ce"]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the best wrong logit minus the logit of y (N,): positive where the example is fooled.

    Its gradient does not vanish where the softmax saturates (Carlini & Wagner 2017, arXiv 1608.04644, f6).
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    return wrong - own


def margin_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the logit of the class `target` (N,) minus the logit of y (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def wrong_classes(logits: Tensor, y: Tensor) -> Tensor:
    """Return the wrong classes of each example, the likeliest first (N, classes - 1)."""
    return logits.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy (N,) in nats."""
    return functional.cross_entropy(logits, y, reduction="none")


LOSSES = {"margin": margin, "ce": cross_entropy}
