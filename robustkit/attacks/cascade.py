"""Cheap attacks first, each further one only on what is left, the most on what is close.

After Liu et al. 2022 (A3, arXiv 2203.05154: cosine steps, output directions, effort where the margin is small), Tashiro
et al. 2020 (output directions, arXiv 2003.06878), Gowal et al. 2019 (one target a restart, arXiv 1910.09338) and
Andriushchenko et al. 2020 (random search by squares, arXiv 1912.00049).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.draws import Stream
from robustkit.attacks.losses import margin, margin_to
from robustkit.attacks.projection import l2_norm, within
from robustkit.attacks.search import Score, Search
from robustkit.attacks.square import square
from robustkit.attacks.threat import BALLS, Threat, checked_norm
from robustkit.errors import AttackError

BudgetName = Literal["quick", "standard", "thorough"]
LAST_STEP = 0.02
"""Length of the last step of a climb as a share of eps."""
BLIND_QUERIES = 10
"""So many times the queries where there is no gradient."""
SEARCH_SHARE, POLISH_SHARE = 0.8, 0.1
"""Share of the pixels that the first square changes: of a search from the image, and of one from the best so far."""
CALLS = 16
"""Random numbers of a stage start at a multiple of this, whatever the stages before it drew."""


@dataclass(frozen=True)
class Schedule:
    """How much of each stage. Steps count forwards and backwards an example that is still attacked.

    `close`: an example is attacked further only while what is left of its margin is less than this times what the
    attack has taken off it already. Examples are judged each by itself, so that their company changes nothing.
    """

    probe: int = 8
    direction: int = 8
    targets: int = 9
    target_steps: int = 10
    sure_targets: int = 3
    """So many of the likeliest targets are tried on every example, the others on those that are close."""
    target_close: float = 3.0
    refine_targets: int = 3
    refine_steps: int = 20
    refine_close: float = 2.0
    restarts: int = 6
    restart_steps: int = 40
    restart_close: float = 0.35
    polish: int = 200
    polish_close: float = 0.1
    queries: int = 100


SCHEDULES: dict[BudgetName, Schedule] = {
    "quick": Schedule(targets=3, refine_targets=1, restarts=1, polish=0, queries=0),
    "standard": Schedule(),
    "thorough": Schedule(
        target_steps=25,
        target_close=math.inf,
        refine_targets=5,
        refine_steps=50,
        refine_close=math.inf,
        restarts=20,
        restart_steps=100,
        restart_close=1.0,
        polish=1000,
        polish_close=1.0,
        queries=2500,
    ),
}


def cosine(eps: Tensor, steps: int) -> list[Tensor]:
    """Return step lengths (N,) that fall from eps to a small share of it along half a cosine."""
    shares = [LAST_STEP + (1 - LAST_STEP) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    return [eps * share for share in shares]


def cascade(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    schedule: Schedule = SCHEDULES["standard"],
) -> Tensor:
    """Return the most adversarial images that a row of attacks met, each run on what the ones before it left.

    x (N, ...) in [0, 1], y (N,). Margin steps from the image; from a random output direction; towards each of the
    likeliest wrong classes; longer towards the most promising of these; restarts for what is close to being fooled;
    small squares for what is nearly there; random search for what gradients do not see.

    A model whose output has no gradient at all is searched only, with more queries; check P9 says so.
    """
    checked_norm("cascade", threat, BALLS)
    run = _Run(model, x, y, threat, generator)
    try:
        run.probe(schedule.probe)
    except AttackError:
        run.search(BLIND_QUERIES * max(1, schedule.queries))
        return run.best
    run.directed(schedule.direction)
    run.targets(schedule)
    run.refine(schedule)
    run.polish(schedule)
    run.search(schedule.queries)
    return run.best


class _Run:
    """One batch under attack."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, generator: torch.Generator) -> None:
        self.found = Search(model, x, y, threat)
        self.threat, self.generator = threat, generator
        self.stream = Stream(self.found.x, generator)
        self.eps = threat.eps_for(self.found.x).flatten()
        self.robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.at_first = torch.zeros(len(x), device=x.device)
        """The margins of the clean images: negative, as these are classified right."""
        self.reach = torch.empty(0)
        self.stage = 0

    @property
    def best(self) -> Tensor:
        """The most adversarial images so far."""
        return self.found.best

    def close(self, factor: float) -> Tensor:
        """Return the positions of the robust examples whose margin left is less than `factor` times that taken."""
        if factor == math.inf:
            return survivors(self.robust)
        highest = self.found.highest
        return survivors(self.robust & (-highest < factor * (highest - self.at_first)))

    def probe(self, steps: int) -> None:
        """Climb the margin from the images themselves: all that an undefended model needs."""
        found = self.found

        def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
            reached = margin(logits, found.y[index])
            if number == 0:
                self.at_first[index] = reached.detach()
            return reached

        self._climb(found.x, found.everyone, score, cosine(self.eps, steps))

    def directed(self, steps: int) -> None:
        """Climb from where a random direction of the outputs leads, two steps of eps away."""
        index = self._begin(math.inf)
        if not len(index):
            return
        classes = self.found.classes.shape[1] + 1
        weight = torch.zeros(len(self.robust), classes, device=self.eps.device)
        weight[index] = 2 * self.stream.uniform(index, classes) - 1
        away = min(2, steps)

        def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
            if number < away:
                return (weight[index] * logits).sum(1)
            return margin(logits, self.found.y[index])

        lengths = [self.eps] * away + cosine(self.eps, steps - away)
        self._climb(self._start(index), index, score, lengths)

    def targets(self, schedule: Schedule) -> None:
        """Climb towards each of the likeliest wrong classes, and note how near each came."""
        count = min(schedule.targets, self.found.classes.shape[1])
        self.reach = torch.full((len(self.robust), count), -torch.inf, device=self.eps.device)
        for rank in range(count):
            index = self._begin(math.inf if rank < schedule.sure_targets else schedule.target_close)
            if not len(index):
                continue
            before = self.found.highest.clone(), self.found.best.clone()
            self.found.highest[index] = -torch.inf
            self._aimed(index, torch.full_like(self.found.y, rank), schedule.target_steps)
            self.reach[index, rank] = self.found.highest[index]
            self._not_below(*before)

    def refine(self, schedule: Schedule) -> None:
        """Climb longer towards the targets that came nearest, and again from other starts where it is close."""
        if not self.reach.numel():
            return
        order = self.reach.argsort(1, descending=True)
        count = order.shape[1]
        for number in range(min(schedule.refine_targets, count)):
            index = self._begin(schedule.refine_close)
            if len(index):
                self._aimed(index, order[:, number], schedule.refine_steps)
        for number in range(schedule.restarts):
            index = self._begin(schedule.restart_close)
            if len(index):
                rank = order[:, number % min(schedule.refine_targets, count)]
                self._aimed(index, rank, schedule.restart_steps)

    def polish(self, schedule: Schedule) -> None:
        """Search by small squares from the best images that are nearly there: the last hair is not for gradients."""
        index = self._begin(schedule.polish_close)
        if schedule.polish and len(index):
            self._squares(index, schedule.polish, POLISH_SHARE, self.found.best[index])

    def search(self, queries: int) -> None:
        """Search by squares what is left: this needs no gradient, so it sees what gradients hide."""
        index = self._begin(math.inf)
        if queries and len(index):
            self._squares(index, queries, SEARCH_SHARE, None)

    def _begin(self, factor: float) -> Tensor:
        self.stage += 1
        self.stream.seek(self.stage * CALLS)
        return self.close(factor)

    def _start(self, index: Tensor) -> Tensor:
        """Return random images of the ball: uniform for linf, else on its surface."""
        x, here = self.found.x[index], self.threat.select(index)
        count = x[:1].numel()
        if self.threat.norm == "linf":
            drawn = 2 * self.stream.uniform(index, count).view(x.shape) - 1
            return within(x, x + drawn * here.eps_for(x), here)
        drawn = self.stream.normal(index, count).view(x.shape)
        return within(x, x + drawn / l2_norm(drawn) * here.eps_for(x), here)

    def _aimed(self, index: Tensor, rank: Tensor, steps: int) -> None:
        """Climb from a random start, one step up the logit of the class of this rank (N,), then its margin."""
        target = self.found.classes.gather(1, rank[:, None]).squeeze(1)

        def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
            if number == 0:
                return logits.gather(1, target[index][:, None]).squeeze(1)
            return margin_to(logits, self.found.y[index], target[index])

        lengths = [self.eps, *cosine(self.eps, steps - 1)]
        self._climb(self._start(index), index, score, lengths)

    def _squares(self, index: Tensor, queries: int, share: float, start: Tensor | None) -> None:
        found, here = self.found, self.threat.select(index)
        images = square(
            found.model,
            found.x[index],
            found.y[index],
            here,
            queries=queries,
            generator=self.generator,
            p_init=share,
            start=start,
        )
        self._left(index, found.probe(images, index))

    def _climb(self, images: Tensor, index: Tensor, score: Score, lengths: Sequence[Tensor]) -> None:
        self._left(index, self.found.climb(images, index, score, lengths))

    def _left(self, index: Tensor, left: Tensor) -> None:
        self.robust[index] = False
        self.robust[left] = True

    def _not_below(self, highest: Tensor, best: Tensor) -> None:
        """Put back the images from before where they were better."""
        found = self.found
        better = highest > found.highest
        found.best = torch.where(better.view(-1, *[1] * (best.dim() - 1)), best, found.best)
        found.highest = torch.maximum(highest, found.highest)


@dataclass(frozen=True)
class Cascade:
    """Cheap attacks first, each further one on what is left; no parameters but how much to spend."""

    seeded_by_example: ClassVar[bool] = True

    budget: Literal["quick", "standard", "thorough"] = "standard"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the most adversarial images met."""
        return cascade(model, x, y, threat, generator=generator, schedule=SCHEDULES[self.budget])
