"""AutoAttack: the four attacks of the standard audit, one after the other (Croce & Hein 2020, arXiv 2003.01690).

Passes an example that survives everything, linf or l2, ten classes or more (standard), with the clean pass: 7,856
forwards (the original looks once more at one result: 7,857) and 1,910 backwards. No attack stops early on a fooled
example, as in the original: this is for audits. `cascade` is for work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.attacks.active import survivors
from robustkit.attacks.apgd import Found, apgd
from robustkit.attacks.draws import Stream
from robustkit.attacks.fab import fab, random_near
from robustkit.attacks.losses import cross_entropy, dlr, dlr_to, wrong_classes
from robustkit.attacks.projection import within
from robustkit.attacks.square import square
from robustkit.attacks.threat import BALLS, Threat, checked_norm
from robustkit.params import PositiveInt

Version = Literal["standard", "plus", "rand"]
STEPS, QUERIES, TARGETS, EOT = 100, 5000, 9, 20
"""Of the original: any others make another protocol."""
PARTS: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


class _Audit:
    """One batch under attack: which examples are still robust, and the images that fooled the others."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        generator: torch.Generator,
        steps: int = STEPS,
        queries: int = QUERIES,
    ) -> None:
        self.model, self.x, self.y, self.threat, self.generator = model, x.detach(), y, threat, generator
        self.steps, self.queries = steps, queries
        self.stream = Stream(self.x, generator)
        self.images = self.x.clone()
        self.alive = torch.arange(len(x), device=x.device)

    def take(self, images: Tensor, fooled: Tensor) -> None:
        """Keep the images of the examples (of `alive`) that are fooled, and drop these."""
        done = survivors(fooled)
        self.images[self.alive[done]] = images[done]
        self.alive = self.alive[survivors(~fooled)]

    def verify(self, images: Tensor) -> Tensor:
        """Return which of these images (one for each of `alive`) the model gets wrong."""
        with torch.no_grad():
            answer: Tensor = self.model(images).argmax(1)
        return answer != self.y[self.alive]

    def logits(self) -> Tensor:
        """Return the logits of the clean images of `alive`."""
        with torch.no_grad():
            logits: Tensor = self.model(self.x[self.alive])
        return logits.float()

    @property
    def here(self) -> tuple[Tensor, Tensor, Threat]:
        """Clean images, labels and threat of `alive`."""
        return self.x[self.alive], self.y[self.alive], self.threat.select(self.alive)


def _apgd(loss: Callable[[Tensor, Tensor], Tensor], restarts: int, eot: int, larger: bool) -> Callable[[_Audit], None]:
    def attack(audit: _Audit) -> None:
        audit.logits()
        y = audit.y
        for _ in range(restarts):
            if not len(audit.alive):
                return
            found = _climb(audit, lambda logits, index: loss(logits, y[index]), eot, larger)
            audit.take(found.images, found.fooled & audit.verify(found.images))

    return attack


def _apgd_targeted(targets: int, larger: bool) -> Callable[[_Audit], None]:
    def attack(audit: _Audit) -> None:
        classes, y = audit.logits().shape[1], audit.y
        for rank in range(min(targets, classes - 1)):
            if not len(audit.alive):
                return
            aim = torch.zeros_like(audit.y)
            aim[audit.alive] = wrong_classes(audit.logits(), audit.y[audit.alive])[:, rank]

            def objective(logits: Tensor, index: Tensor, aim: Tensor = aim) -> Tensor:
                return dlr_to(logits, y[index], aim[index])

            found = _climb(audit, objective, 1, larger)
            audit.take(found.images, found.fooled)

    return attack


def _climb(audit: _Audit, objective: Callable[[Tensor, Tensor], Tensor], eot: int, larger: bool) -> Found:
    x, y, threat = audit.here
    if not larger:
        return apgd(audit.model, x, y, threat, objective, audit.stream, audit.alive, steps=audit.steps, eot=eot)
    # For l1 the original starts with larger balls (Croce & Hein 2021, section 3.3).
    start: Tensor | None = None
    found: Found | None = None
    for factor, part in ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)):
        wide = threat.scaled(factor)
        begin = None if start is None else within(x, start, wide)
        found = apgd(
            audit.model,
            x,
            y,
            wide,
            objective,
            audit.stream,
            audit.alive,
            steps=max(1, int(part * audit.steps)),
            eot=eot,
            start=begin,
        )
        start = found.images
    assert found is not None
    return found


def _fab_targeted(targets: int) -> Callable[[_Audit], None]:
    def attack(audit: _Audit) -> None:
        classes = audit.logits().shape[1]
        for rank in range(min(targets, classes - 1)):
            if not len(audit.alive):
                return
            audit.logits()
            target = wrong_classes(audit.logits(), audit.y[audit.alive])[:, rank]
            _fab(audit, target, None)

    return attack


def _fab_untargeted(restarts: int) -> Callable[[_Audit], None]:
    def attack(audit: _Audit) -> None:
        audit.logits()
        for restart in range(restarts):
            if not len(audit.alive):
                return
            audit.logits()
            x, _, threat = audit.here
            start = random_near(x, threat, audit.stream, audit.alive) if restart else None
            _fab(audit, None, start)

    return attack


def _fab(audit: _Audit, target: Tensor | None, start: Tensor | None) -> None:
    x, y, threat = audit.here
    images, length = fab(audit.model, x, y, threat.norm, target, steps=audit.steps, start=start)
    audit.take(images, audit.verify(images) & (length <= threat.eps_for(x).flatten()))


def _square(audit: _Audit) -> None:
    audit.logits()
    x, y, threat = audit.here
    audit.logits()
    images = square(audit.model, x, y, threat, queries=audit.queries + 1, generator=audit.generator)
    audit.take(images, audit.verify(images))


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator,
    version: Version = "standard",
    steps: int = STEPS,
    queries: int = QUERIES,
) -> Tensor:
    """Return adversarial images for x (N, ...) in [0, 1] with labels y (N,), x itself where no part found one.

    Raises:
        AttackError: the model's output has no gradient.
    """
    checked_norm("autoattack", threat, BALLS)
    audit = _Audit(model, x, y, threat, generator, steps, queries)
    for part in PARTS[version]:
        if len(audit.alive):
            _part(part, version, threat.norm)(audit)
    return audit.images


def _part(part: str, version: Version, norm: str) -> Callable[[_Audit], None]:
    restarts = 5 if version == "plus" or (version == "standard" and norm == "l1") else 1
    eot = EOT if version == "rand" else 1
    larger = version == "standard" and norm == "l1"
    targets = 5 if larger else TARGETS
    if part == "apgd-ce":
        return _apgd(cross_entropy, restarts, eot, larger)
    if part == "apgd-dlr":
        return _apgd(dlr, restarts, eot, larger)
    if part == "apgd-t":
        return _apgd_targeted(targets, larger)
    if part == "fab-t":
        return _fab_targeted(TARGETS)
    return _fab_untargeted(restarts) if part == "fab" else _square


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack, faithful: APGD-CE, APGD-T, FAB-T and Square, for audits (Croce & Hein 2020)."""

    seeded_by_example: ClassVar[bool] = True

    version: Literal["standard", "plus", "rand"] = "standard"
    steps: PositiveInt = 100
    n_queries: PositiveInt = 5000

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to stand beside the figure."""
        if (self.steps, self.n_queries) == (STEPS, QUERIES):
            return ()
        return (f"not AutoAttack's budget: {self.steps} steps of {STEPS}, {self.n_queries} queries of {QUERIES}",)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator) -> Tensor:
        """Return adversarial images where a part found some, else the clean ones."""
        return autoattack(
            model,
            x,
            y,
            threat,
            generator=generator,
            version=self.version,
            steps=self.steps,
            queries=self.n_queries,
        )
