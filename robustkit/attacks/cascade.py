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
from robustkit.attacks.schedules import SCHEDULES, Schedule
from robustkit.attacks.search import Score, Search
from robustkit.attacks.square import square
from robustkit.attacks.threat import BALLS, Threat, checked_norm
from robustkit.errors import AttackError

LAST_STEP = 0.02
"""Length of the last step of a climb as a share of eps."""
BLIND_QUERIES = 10
"""So many times the queries where there is no gradient."""
SEARCH_SHARE, POLISH_SHARE = 0.8, 0.1
"""Share of the pixels that the first square changes: of a search from the image, and of one from the best so far."""
CALLS = 16
"""Random numbers of a stage start at a multiple of this, whatever the stages before it drew."""


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
        self.threat = threat
        # A generator for each search by squares: whether the other one ran changes nothing.
        self.polishing, self.searching = (_child(generator) for _ in range(2))
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
        index = self.close(math.inf)
        self.stage += 1
        self.stream.seek(self.stage * CALLS)
        classes = self.found.classes.shape[1] + 1
        weight = torch.zeros(len(self.robust), classes, device=self.eps.device)
        weight[index] = 2 * self.stream.uniform(index, classes) - 1
        away = min(2, steps)

        def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
            if number < away:
                return (weight[index] * logits).sum(1)
            return margin(logits, self.found.y[index])

        lengths = [self.eps] * away + cosine(self.eps, steps - away)
        start = self._start(index, self.stage)
        self._climb(start, index, score, lengths)

    def targets(self, schedule: Schedule) -> None:
        """Climb towards the likeliest wrong classes, and where it is close to the others; note how near each came."""
        count = min(schedule.targets, self.found.classes.shape[1])
        sure = min(schedule.sure_targets, count)
        self.reach = torch.full((len(self.robust), count), -torch.inf, device=self.eps.device)
        for ranks, factor in ((range(sure), math.inf), (range(sure, count), schedule.target_close)):
            index = self.close(factor)
            columns = torch.tensor(ranks, device=index.device, dtype=torch.int64)
            if len(ranks):
                reached = self._aimed(index, columns.expand(len(index), -1), schedule.target_steps)
                self.reach[index[:, None], columns] = reached

    def refine(self, schedule: Schedule) -> None:
        """Climb longer towards the targets that came nearest, and again from other starts where it is close."""
        if not self.reach.numel():
            return
        best = self.reach.argsort(1, descending=True)[:, : schedule.refine_targets]
        index = self.close(schedule.refine_close)
        self._aimed(index, best[index], schedule.refine_steps)
        for _ in range(schedule.restarts):
            index = self.close(schedule.restart_close)
            self._aimed(index, best[index], schedule.restart_steps)

    def polish(self, schedule: Schedule) -> None:
        """Search by small squares from the best images that are nearly there: the last hair is not for gradients."""
        index = self.close(schedule.polish_close)
        if schedule.polish and len(index):
            self._squares(index, schedule.polish, POLISH_SHARE, self.polishing, self.found.best[index])

    def search(self, queries: int) -> None:
        """Search by squares what is left: this needs no gradient, so it sees what gradients hide."""
        index = self.close(math.inf)
        if queries and len(index):
            self._squares(index, queries, SEARCH_SHARE, self.searching, None)

    def _start(self, index: Tensor, stage: int) -> Tensor:
        """Return random images of the ball, each stage's own: uniform for linf, else on its surface."""
        self.stream.seek(stage * CALLS)
        x, here = self.found.x[index], self.threat.select(index)
        bounded = self.threat.norm == "linf"
        drawn = self.stream.change(index, x, bounded=bounded)
        return within(x, x + (drawn if bounded else drawn / l2_norm(drawn)) * here.eps_for(x), here)

    def _aimed(self, index: Tensor, ranks: Tensor, steps: int) -> Tensor:
        """Climb towards the classes of these ranks (n, k) from a random start each; return the margins reached (n, k).

        As many ranks at once as the batch has room for, so that few examples left do not mean small steps of work. What
        an example finds does not depend on how many that are: it leaves with the first rank that fools it.
        """
        first, count = self.stage + 1, ranks.shape[1]
        self.stage += count
        reached = torch.full(ranks.shape, -torch.inf, device=self.eps.device)
        at_once = max(1, len(self.robust) // max(1, len(index)))
        rows = torch.arange(len(index), device=index.device)
        for rank in range(0, count, at_once):
            rows = rows[survivors(self.robust[index[rows]])]
            if not len(rows):
                break
            chosen = ranks[rows, rank : rank + at_once]
            starts = [self._start(index[rows], first + rank + copy) for copy in range(chosen.shape[1])]
            reached[rows, rank : rank + at_once] = self._towards(index[rows], chosen, torch.cat(starts), steps)
        return reached

    def _towards(self, index: Tensor, ranks: Tensor, start: Tensor, steps: int) -> Tensor:
        """Climb, one step up the logit of the class of a rank (n, k), then its margin; return the margins reached."""
        apart = self.found.apart(index.repeat(ranks.shape[1]))
        target = apart.classes.gather(1, ranks.T.reshape(-1, 1)).squeeze(1)

        def score(logits: Tensor, index: Tensor, number: int) -> Tensor:
            if number == 0:
                return logits.gather(1, target[index][:, None]).squeeze(1)
            return margin_to(logits, apart.y[index], target[index])

        eps = self.eps[index].repeat(ranks.shape[1])
        apart.climb(start, apart.everyone, score, [eps, *cosine(eps, steps - 1)])
        reached, left = self.found.join(apart, index)
        self._left(index, left)
        return reached

    def _squares(
        self, index: Tensor, queries: int, share: float, generator: torch.Generator, start: Tensor | None
    ) -> None:
        found, here = self.found, self.threat.select(index)
        images = square(
            found.model,
            found.x[index],
            found.y[index],
            here,
            queries=queries,
            generator=generator,
            p_init=share,
            start=start,
        )
        self._left(index, found.probe(images, index))

    def _climb(self, images: Tensor, index: Tensor, score: Score, lengths: Sequence[Tensor]) -> None:
        self._left(index, self.found.climb(images, index, score, lengths))

    def _left(self, index: Tensor, left: Tensor) -> None:
        self.robust[index] = False
        self.robust[left] = True


def _child(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator(device=generator.device).manual_seed(int(seed))


@dataclass(frozen=True)
class Cascade:
    """Cheap attacks first, each further one on what is left; no parameters but how much to spend."""

    seeded_by_example: ClassVar[bool] = True

    budget: Literal["quick", "standard", "thorough"] = "standard"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return the most adversarial images met."""
        return cascade(model, x, y, threat, generator=generator, schedule=SCHEDULES[self.budget])
