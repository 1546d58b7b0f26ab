"""The loop that gradient attacks share: one forward a step, fooled examples leave at once, the best iterate is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.losses import as_logits, margin, wrong_classes
from robustkit.attacks.projection import l2_direction, largest, within
from robustkit.attacks.threat import Threat
from robustkit.errors import AttackError

NO_GRADIENT = (
    "the model's output has no gradient with respect to the images (rounding, numpy or .detach() on the way?), so a "
    "gradient attack cannot run; attack by queries, e.g. square, or attack a differentiable surrogate"
)
Score = Callable[[Tensor, Tensor, int], Tensor]
"""(logits (n, classes), positions of these examples in the batch (n,), step) -> what to climb, one number each."""


def input_gradient(score: Tensor, images: Tensor, *, keep: bool = False) -> Tensor:
    """Return the gradient of a score (one number) with respect to the images it was computed from.

    `keep`: another score of the same forward is to follow.

    Raises:
        AttackError: the score does not depend on the images through autograd.
    """
    if not score.requires_grad:
        raise AttackError(NO_GRADIENT)
    (gradient,) = torch.autograd.grad(score, images, retain_graph=keep, allow_unused=True)
    if gradient is None:
        raise AttackError(NO_GRADIENT)
    return gradient


def steepest(x: Tensor, gradient: Tensor, threat: Threat, length: Tensor) -> Tensor:
    """Return the change of x (N, ...) that raises a linear loss most; `length` (N, 1, ..., 1) in the threat's norm.

    linf: the sign; l2: the direction, without pixels that are at their bound already; l1: whole pixels, steepest first,
    each as far as [0, 1] lets it go; l0: the values that gain most by going to a bound.
    """
    if threat.norm == "linf":
        return gradient.sign() * length
    room = torch.where(gradient > 0, 1 - x, x)
    if threat.norm == "l2":
        return l2_direction(gradient * (room > 0)) * length
    if threat.norm == "l0":
        return gradient.sign() * room * largest(gradient.abs() * room, length)
    room = room.flatten(1)
    order = gradient.flatten(1).abs().argsort(1, descending=True)
    sorted_room = room.gather(1, order)
    before = sorted_room.cumsum(1) - sorted_room
    share = torch.minimum((length.flatten(1) - before).clamp_min(0), sorted_room)
    return gradient.sign() * torch.zeros_like(room).scatter(1, order, share).view(x.shape)


def step(x: Tensor, images: Tensor, gradient: Tensor, threat: Threat, length: Tensor, number: int) -> Tensor:
    """Return the images after one ascent step of `length` (n, 1, ..., 1), inside the ball around x and in [0, 1].

    For l1 a Frank-Wolfe step of at least 2 / (number + 2) is taken (Jaggi 2013, PMLR 28:427): a sparse step would be
    thinned out again by the projection, a step towards the best corner stays inside. For l0 `length` of
    the changed values are exchanged: a small step would be undone by the projection.
    """
    if threat.norm == "l1":
        eps = threat.eps_for(x)
        share = (length / eps.clamp_min(1e-12)).clamp(2 / (number + 2), 1)
        return images + share * (x + steepest(x, gradient, threat, eps) - images)
    if threat.norm == "l0":
        return _exchange(x, images, gradient, threat.eps_for(x), length)
    return within(x, images + steepest(images, gradient, threat, length), threat)


def _exchange(x: Tensor, images: Tensor, gradient: Tensor, eps: Tensor, length: Tensor) -> Tensor:
    """Put back the `length` changed values that gain least to first order; take as many that gain most to a bound."""
    bound = torch.where(gradient == 0, x, (gradient > 0).to(x.dtype))
    gain = gradient * (bound - x)
    changed = images != x
    kept = changed & largest(torch.where(changed, gain, -1.0), eps - length.ceil().clamp_min(1))
    free = eps - kept.flatten(1).sum(1).view(eps.shape)
    return torch.where(kept | largest(torch.where(kept, -1.0, gain), free), bound, x)


class Search:
    """The most adversarial images found so far for a batch, and how the search goes on from any start.

    x (N, ...) in [0, 1], y (N,). `best` (N, ...) are the images, `highest` (N,) their margins: positive where the
    example is fooled. Outputs that are probabilities are taken as logarithms, so that the margin does not saturate.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.model, self.x, self.y, self.threat = model, x.detach(), y, threat
        self.best = self.x.clone()
        self.highest = torch.full((x.shape[0],), -torch.inf, device=x.device)
        self.classes = torch.empty((0, 0), dtype=torch.int64, device=x.device)
        """Each example's wrong classes (N, classes - 1), the likeliest at the first images first; set by these."""

    @property
    def everyone(self) -> Tensor:
        """The positions of all examples."""
        return torch.arange(self.x.shape[0], device=self.x.device)

    def apart(self, rows: Tensor) -> Search:
        """Return a search for the examples at `rows` (n,), each as often as it is there, that has found nothing yet."""
        other = Search(self.model, self.x[rows], self.y[rows], self.threat.select(rows))
        other.classes = self.classes[rows]
        return other

    def join(self, other: Search, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what a search apart found, the examples at `index` (n,) repeated k times: the first that fools, else the
        highest. Return the margins that it reached (n, k), and which examples are still robust."""
        reached = other.highest.view(-1, len(index))
        fools = reached > 0
        copy = torch.where(fools.any(0), fools.int().argmax(0), reached.argmax(0))
        everyone = torch.arange(len(index), device=index.device)
        highest, images = reached[copy, everyone], other.best[copy * len(index) + everyone]
        better = highest > self.highest[index]
        self.best[index] = torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, self.best[index])
        self.highest[index] = torch.where(better, highest, self.highest[index])
        return reached.T, index[survivors(~fools.any(0))]

    def climb(self, images: Tensor, alive: Tensor, score: Score, lengths: Sequence[Tensor]) -> Tensor:
        """Climb `score` from `images` (n, ...), those of the examples at `alive` (n,); return which are still robust.

        `lengths`: one step length (N,) a step, in the threat's norm. len(lengths) + 1 forwards and len(lengths)
        backwards an example that is not fooled.

        Raises:
            AttackError: the model's output has no gradient.
        """
        for number, length in enumerate(lengths):
            images = images.detach().requires_grad_()
            with torch.enable_grad():
                logits = as_logits(self.model(images).float())
            left = self.look(images.detach(), logits.detach(), alive)
            if not len(left):
                return alive[left]
            with torch.enable_grad():
                total = score(logits[left], alive[left], number).sum()
            gradient = input_gradient(total, images)[left]
            alive = alive[left]
            here = self.threat.select(alive)
            size = length[alive].view(-1, *[1] * (images.dim() - 1))
            images = step(self.x[alive], images.detach()[left], gradient, here, size, number)
        return self.probe(images.detach(), alive)

    def probe(self, images: Tensor, alive: Tensor) -> Tensor:
        """Try images (n, ...) of the examples at `alive` (n,) with one forward; return which are still robust."""
        with torch.no_grad():
            logits = as_logits(self.model(images).float())
        return alive[self.look(images, logits, alive)]

    def look(self, images: Tensor, logits: Tensor, alive: Tensor) -> Tensor:
        """Keep the images that are better than the best so far; return which rows (of n) are still robust."""
        if not self.classes.numel():
            self.classes = wrong_classes(logits, self.y)
        reached = margin(logits, self.y[alive])
        better = reached > self.highest[alive]
        shape = (-1, *[1] * (images.dim() - 1))
        self.best[alive] = torch.where(better.view(shape), images, self.best[alive])
        self.highest[alive] = torch.where(better, reached, self.highest[alive])
        # Not `reached <= 0`: an example whose logits are NaN is not fooled.
        return survivors(~(reached > 0))
