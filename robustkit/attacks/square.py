"""Square: random search by square patches, without gradients (Andriushchenko et al. 2020, arXiv 1912.00049).

The l1 form is that of Croce & Hein 2021 (arXiv 2103.01208, section 4).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.draws import Stream
from robustkit.attacks.losses import as_logits, margin
from robustkit.attacks.projection import within
from robustkit.attacks.threat import BALLS, Threat, checked_norm
from robustkit.params import Fraction, PositiveInt

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries the share of changed pixels is halved (section 5.1, for a budget of 10,000)."""

AHEAD = 64
"""Queries that signs are drawn for at once."""


@dataclass
class _Pool:
    """The examples that are not fooled yet, as (n, channels, height, width), and the best images of each."""

    x: Tensor
    y: Tensor
    eps: Tensor
    index: Tensor
    best: Tensor
    lowest: Tensor

    def keep(self, rows: Tensor) -> None:
        """Drop all but these rows."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    queries: int,
    generator: torch.Generator,
    p_init: float = 0.8,
    start: Tensor | None = None,
) -> Tensor:
    """Return x (N, ...) with the patches that fool the model, or lower its margin most, found by random search.

    The last three dimensions are channels, height and width; with fewer dimensions there is one channel, and a vector
    is one row of pixels. `start`: images (N, ...) to go on from. The windows are the same for all examples, the
    signs are each example's own. `queries` forwards an example that is not fooled, no gradient.
    """
    checked_norm("square", threat, BALLS)
    shape = _image_shape(x)
    stream = Stream(x, generator)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    windows = random.Random(seed)
    signs = _Signs(stream, len(x), shape[1])
    moves = _Linf(signs, windows) if threat.norm == "linf" else _Eta(signs, windows, threat.norm)
    images = x.detach().reshape(shape)
    everyone = torch.arange(len(x), device=x.device)
    pool = _Pool(
        x=images,
        y=y,
        eps=threat.eps_for(images),
        index=everyone,
        best=moves.start(images, threat, everyone) if start is None else start.detach().reshape(shape),
        lowest=torch.full((len(x),), torch.inf, device=x.device),
    )
    found = pool.best.clone()
    for query in range(queries):
        tried = pool.best if query == 0 else moves.propose(pool, threat.select(pool.index), share(query - 1, p_init))
        with torch.no_grad():
            reached = -margin(as_logits(model(tried.view(-1, *x.shape[1:])).float()), pool.y)
        better = reached < pool.lowest
        pool.best = torch.where(better.view(-1, 1, 1, 1), tried, pool.best)
        pool.lowest = torch.where(better, reached, pool.lowest)
        left = survivors(~(pool.lowest < 0))
        if len(left) < len(pool.index) or query == queries - 1:
            found[pool.index] = pool.best
            pool.keep(left)
        if not len(left):
            break
    return found.view(x.shape)


def share(query: int, p_init: float) -> float:
    """Return the share of pixels that a query changes."""
    halvings = sum(query > bound for bound in HALVED_AT)
    return math.ldexp(p_init, -halvings)


def _image_shape(x: Tensor) -> tuple[int, int, int, int]:
    inner = (1, 1, 1, *x.shape[1:])[-3:]
    return (len(x), int(math.prod(x.shape[1:-2])) if x.dim() > 4 else inner[0], inner[1], inner[2])


def window_sides(part: float, height: int, width: int, least: int = 1) -> tuple[int, int]:
    """Return the sides of a window with this share of the area: a square, or as near to one as the image allows."""
    side = max(round(math.sqrt(part * height * width)), least)
    tall = min(side, height)
    wide = min(side if side <= height else max(round(part * height * width / tall), 1), width)
    return tall, wide


class _Signs:
    """A sign for each channel of each example, drawn for many queries ahead: one draw costs as much as many."""

    def __init__(self, stream: Stream, examples: int, channels: int) -> None:
        self.stream, self.channels = stream, channels
        self.everyone = torch.arange(examples, device=stream.device)
        self.drawn: list[Tensor] = []

    def of(self, index: Tensor) -> Tensor:
        """Return -1 and 1 (n, channels, 1, 1) for the examples at `index` (n,)."""
        if not self.drawn:
            ahead = self.stream.signs(self.everyone, AHEAD * self.channels)
            self.drawn = list(ahead.view(len(ahead), AHEAD, self.channels, 1, 1).unbind(1))
        return self.drawn.pop()[index]


class _Linf:
    """Patches of -eps or eps a channel; the start are vertical stripes."""

    def __init__(self, signs: _Signs, windows: random.Random) -> None:
        self.signs, self.windows = signs, windows

    def start(self, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Return x with stripes of -eps or eps, one pixel wide."""
        _, channels, _, width = x.shape
        stripes = self.signs.stream.signs(index, channels * width).view(-1, channels, 1, width)
        return within(x, x + stripes * threat.eps_for(x), threat)

    def propose(self, pool: _Pool, threat: Threat, part: float) -> Tensor:
        """Return the best images with one window set to -eps or eps."""
        height, width = pool.x.shape[2:]
        tall, wide = window_sides(part, height, width)
        top, left = self.windows.randrange(height - tall + 1), self.windows.randrange(width - wide + 1)
        signs = self.signs.of(pool.index)
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        tried = pool.best.clone()
        tried[:, :, rows, columns] = (pool.x[:, :, rows, columns] + signs * pool.eps).clamp(0, 1)
        return tried


class _Eta:
    """l2 and l1: bumps whose norm is taken from another window, so that the whole budget stays in use."""

    def __init__(self, signs: _Signs, windows: random.Random, norm: str) -> None:
        self.signs, self.windows, self.order = signs, windows, 2 if norm == "l2" else 1

    def start(self, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Return x with a grid of bumps."""
        height, width = x.shape[2:]
        side = max(min(height, width) // 5, 1)
        change = torch.zeros_like(x)
        for top in range((height % side) // 2, height - side + 1, side):
            for left in range((width % side) // 2, width - side + 1, side):
                signs = self.signs.of(index)
                change[:, :, top : top + side, left : left + side] += self._bump(side, side, x) * signs
        return within(x, x + change / self._norm(change) * threat.eps_for(x), threat)

    def propose(self, pool: _Pool, threat: Threat, part: float) -> Tensor:
        """Return the best images with a new bump in one window, paid for by what lay there and in another one."""
        _, channels, height, width = pool.x.shape
        tall, wide = window_sides(part, height, width, least=3)
        change = pool.best - pool.x
        here, there = self._window(tall, wide, height, width), self._window(tall, wide, height, width)
        both = torch.zeros((1, 1, height, width), device=change.device, dtype=change.dtype)
        both[here], both[there] = 1, 1
        freed = self._each(change * both) ** self.order
        left = (pool.eps**self.order - self._norm(change) ** self.order).clamp_min(0)
        signs = self.signs.of(pool.index)
        old = change[here]
        fresh = self._bump(tall, wide, change) * signs + old / self._each(old)
        budget = (left / channels + freed) ** (1 / self.order)
        change[there] = 0
        change[here] = fresh / self._each(fresh) * budget
        return within(pool.x, pool.x + change / self._norm(change) * pool.eps, threat)

    def _window(self, tall: int, wide: int, height: int, width: int) -> tuple[slice, slice, slice, slice]:
        top, left = self.windows.randrange(height - tall + 1), self.windows.randrange(width - wide + 1)
        return slice(None), slice(None), slice(top, top + tall), slice(left, left + wide)

    def _norm(self, change: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(change.flatten(1), ord=self.order, dim=1).clamp_min(1e-12)
        return size.view(-1, 1, 1, 1)

    def _each(self, change: Tensor) -> Tensor:
        """Return the norm of each channel."""
        size: Tensor = torch.linalg.vector_norm(change, ord=self.order, dim=(2, 3), keepdim=True)
        return size.clamp_min(1e-12)

    def _bump(self, tall: int, wide: int, like: Tensor) -> Tensor:
        """Return a positive and a negative half of unit norm together, tall x wide, turned at random."""
        first = _half_bump(tall // 2, wide)
        second = _half_bump(tall - tall // 2, wide)
        bump = torch.cat([first, -second])
        if tall == wide and self.windows.random() > 0.5:
            bump = bump.T
        unit: Tensor = (bump / torch.linalg.vector_norm(bump, ord=self.order).clamp_min(1e-12)).to(
            like.device, like.dtype
        )
        return unit


def _half_bump(tall: int, wide: int) -> Tensor:
    """Return nested rectangles around the middle whose heights fall with the square of their number (section 3.3)."""
    bump = torch.zeros(tall, wide)
    top, left = tall // 2, wide // 2
    for ring in range(max(tall // 2, wide // 2) + 1):
        rows = slice(max(top - ring, 0), max(min(top + ring + 1, tall), 0))
        columns = slice(max(left - ring, 0), max(min(left + ring + 1, wide), 0))
        bump[rows, columns] += 1 / (ring + 1) ** 2
    return bump


@dataclass(frozen=True)
class Square:
    """Square attack: random search by patches, no gradients (Andriushchenko et al. 2020)."""

    seeded_by_example: ClassVar[bool] = True
    gradient_free: ClassVar[bool] = True

    n_queries: PositiveInt = 5000
    restarts: PositiveInt = 1
    p_init: Fraction = 0.8

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the images with the lowest margin that the queries met."""
        images = x.detach().clone()
        alive = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            found = square(
                model,
                x[alive],
                y[alive],
                threat.select(alive),
                queries=self.n_queries,
                p_init=self.p_init,
                generator=generator,
            )
            images[alive] = found
            if self.restarts == 1:
                break
            with torch.no_grad():
                alive = alive[survivors(model(found).argmax(1) == y[alive])]
            if not len(alive):
                break
        return images
