"""Auto-PGD: projected gradient ascent with momentum that halves its own step (Croce & Hein 2020, arXiv 2003.01690).

For l1 the sparse steps of Croce & Hein 2021 (arXiv 2103.01208, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.draws import Stream
from robustkit.attacks.losses import cross_entropy, dlr, margin
from robustkit.attacks.projection import l2_direction, l2_norm, within
from robustkit.attacks.search import input_gradient
from robustkit.attacks.threat import BALLS, Threat, checked_norm
from robustkit.params import PositiveInt

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits (n, classes), positions of these examples in the batch (n,)) -> what to climb, one number each."""
MOMENTUM = 0.75
PROGRESS = 0.75
"""Share of the steps of a window that must climb, or the step is halved."""
LOSSES = {"ce": cross_entropy, "dlr": dlr, "margin": margin}


@dataclass
class Found:
    """What a run found: `images` (n, ...), adversarial where `fooled` (n,), else those with the highest loss."""

    images: Tensor
    fooled: Tensor


def windows(steps: int) -> Iterator[tuple[int, int]]:
    """Yield (step, window): after which steps the step length is reconsidered, looking back how far."""
    window, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    step = window
    while step <= steps:
        yield step, window
        window = max(window - shrink, least)
        step += window


class _Point:
    """Images of one step with what the model says of them."""

    def __init__(self, model: nn.Module, images: Tensor, y: Tensor, objective: Objective, index: Tensor, eot: int):
        gradient, value = torch.zeros_like(images), torch.zeros(len(y), device=images.device)
        for _ in range(eot):
            start = images.detach().requires_grad_()
            with torch.enable_grad():
                logits = model(start).float()
                reached = objective(logits, index)
                gradient += input_gradient(reached.sum(), start) / eot
            value += reached.detach() / eot
        self.images, self.gradient, self.value = images.detach(), gradient, value
        # Not margin > 0 of NaN logits: these fool nobody.
        self.fooled = margin(logits.detach(), y) > 0


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    objective: Objective,
    stream: Stream,
    index: Tensor,
    *,
    steps: int = 100,
    eot: int = 1,
    start: Tensor | None = None,
) -> Found:
    """Return what Auto-PGD finds around x (n, ...) with labels y (n,), at `index` (n,) of `stream`'s examples.

    `threat` is that of these examples; `start` (n, ...) replaces the random start; the gradient of each step is the
    mean over `eot` passes. steps + 1 forwards and backwards an example, times `eot`: no example leaves early, as in
    the original.

    Raises:
        AttackError: the model's output has no gradient.
    """
    checked_norm("apgd", threat, BALLS)
    x = x.detach()
    now = _Point(model, _random(x, threat, stream, index) if start is None else start, y, objective, index, eot)
    rule: _Halving | _Sparse = (_Sparse if threat.norm == "l1" else _Halving)(x, threat, now, steps)
    adversarial, fooled = now.images, now.fooled
    best = now
    for number in range(steps):
        now = _Point(model, rule.move(now, number), y, objective, index, eot)
        adversarial = _where(now.fooled, now.images, adversarial)
        fooled = fooled | now.fooled
        best = _better(best, now)
        now = rule.adapt(now, best, number + 1)
    return Found(_where(fooled, adversarial, best.images), fooled)


def _better(best: _Point, now: _Point) -> _Point:
    return _merge(now.value > best.value, now, best)


def _merge(mask: Tensor, first: _Point, second: _Point) -> _Point:
    merged = object.__new__(_Point)
    merged.images = _where(mask, first.images, second.images)
    merged.gradient = _where(mask, first.gradient, second.gradient)
    merged.value = torch.where(mask, first.value, second.value)
    merged.fooled = torch.where(mask, first.fooled, second.fooled)
    return merged


def _where(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (first.dim() - 1)), first, second)


def _random(x: Tensor, threat: Threat, stream: Stream, index: Tensor) -> Tensor:
    """Return starts on the surface of the ball: a uniform draw scaled to linf eps, a normal one to l2 or l1 eps."""
    eps = threat.eps_for(x)
    drawn = stream.change(index, x, bounded=threat.norm == "linf")
    if threat.norm == "linf":
        largest = drawn.flatten(1).abs().amax(1).clamp_min(1e-12).view(eps.shape)
        return within(x, x + drawn / largest * eps, threat)
    if threat.norm == "l2":
        return within(x, x + drawn / l2_norm(drawn) * eps, threat)
    return within(x, x + drawn, threat)


class _Halving:
    """linf and l2: momentum, and a step that starts at 2 eps and is halved where a window brought too little."""

    def __init__(self, x: Tensor, threat: Threat, start: _Point, steps: int) -> None:
        self.x, self.threat = x, threat
        self.windows = dict(windows(steps))
        self.size = 2 * threat.eps_for(x)
        self.before = start.images
        self.values = [start.value]
        self.best_before = start.value
        self.reduced_before = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def move(self, now: _Point, number: int) -> Tensor:
        """Return the next images."""
        momentum = MOMENTUM if number else 1.0
        ascent = now.gradient.sign() if self.threat.norm == "linf" else l2_direction(now.gradient)
        there = _projected(self.x, now.images + self.size * ascent, self.threat)
        next_ = now.images + momentum * (there - now.images) + (1 - momentum) * (now.images - self.before)
        self.before = now.images
        return _projected(self.x, next_, self.threat)

    def adapt(self, now: _Point, best: _Point, number: int) -> _Point:
        """Halve steps after a window that did not help, and go back to the best images there."""
        self.values.append(now.value)
        window = self.windows.get(number)
        if window is None:
            return now
        recent = torch.stack(self.values[-window - 1 :])
        stuck = (recent[1:] > recent[:-1]).sum(0) <= window * PROGRESS
        idle = ~self.reduced_before & (self.best_before >= best.value)
        reduce = stuck | idle
        self.reduced_before, self.best_before = reduce, best.value
        self.size = torch.where(reduce.view(self.size.shape), self.size / 2, self.size)
        return _merge(reduce, best, now)


def _projected(x: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Return images in ball and box; for l2 first the ball, then the box, as in the original."""
    if threat.norm == "linf":
        return within(x, images, threat)
    delta = images - x
    return (x + delta * (threat.eps_for(x) / l2_norm(delta)).clamp(max=1.0)).clamp(0, 1)


class _Sparse:
    """l1: steps along the steepest pixels only, how many is read off the best images so far."""

    SHARE, SHRINK, LEAST, RELATIVE, WINDOW = 0.2, 1.5, 10.0, 0.95, 0.04

    def __init__(self, x: Tensor, threat: Threat, start: _Point, steps: int) -> None:
        self.x, self.threat, self.features = x, threat, x[:1].numel()
        self.window = max(int(self.WINDOW * steps), 1)
        self.largest = threat.eps_for(x)
        self.size = self.largest
        self.share = torch.full((len(x),), self.SHARE, device=x.device)
        self.changed = self.share * self.features

    def move(self, now: _Point, number: int) -> Tensor:
        """Return the next images."""
        steep = now.gradient.flatten(1).abs()
        place = ((1 - self.share) * self.features).clamp(0, self.features - 1).to(torch.int64)
        least = steep.sort(1).values.gather(1, place[:, None])
        chosen = (now.gradient.flatten(1) * (steep >= least)).sign().view(self.x.shape)
        count = chosen.flatten(1).abs().sum(1).clamp_min(1e-10).view(self.size.shape)
        return within(self.x, now.images + self.size * chosen / count, self.threat)

    def adapt(self, now: _Point, best: _Point, number: int) -> _Point:
        """Follow the sparsity of the best images; where it still falls, start again from them with a long step."""
        if number % self.window:
            return now
        changed = ((best.images - self.x).flatten(1).abs() > 0).sum(1).to(torch.float32)
        fewer = changed / self.changed.clamp_min(1e-10) < self.RELATIVE
        self.share = changed / self.features / self.SHRINK
        shrunk = torch.clamp(self.size / self.SHRINK, self.largest / self.LEAST, self.largest)
        self.size = torch.where(fewer.view(self.size.shape), self.largest, shrunk)
        self.changed = changed
        return _merge(fewer, best, now)


@dataclass(frozen=True)
class Apgd:
    """Auto-PGD with one loss: no step size to choose (Croce & Hein 2020)."""

    seeded_by_example: ClassVar[bool] = True

    loss: Literal["ce", "dlr", "margin"] = "ce"
    steps: PositiveInt = 100
    restarts: PositiveInt = 1
    eot: PositiveInt = 1

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the most adversarial images of all restarts; fooled examples take part in no further restart."""
        stream = Stream(x, generator)
        images = x.detach().clone()
        alive = torch.arange(len(x), device=x.device)
        chosen = LOSSES[self.loss]

        def objective(logits: Tensor, index: Tensor) -> Tensor:
            return chosen(logits, y[index])

        for _ in range(self.restarts):
            here = threat.select(alive)
            found = apgd(model, x[alive], y[alive], here, objective, stream, alive, steps=self.steps, eot=self.eot)
            images[alive] = found.images
            alive = alive[survivors(~found.fooled)]
            if not len(alive):
                break
        return images
