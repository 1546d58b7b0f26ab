"""Small attacks that are held against each other: what one finds, the others should find too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import fgsm
from robustkit.attacks.noise import noise
from robustkit.attacks.projection import random_start
from robustkit.attacks.square import square
from robustkit.attacks.threat import BALLS, Threat
from robustkit.errors import AttackError
from robustkit.evaluation.attacked import as_images, checked_logits
from robustkit.evaluation.checks.batch import EXAMPLES, Batch, seed_models
from robustkit.evaluation.checks.climb import falls_at
from robustkit.evaluation.checks.selftest import self_test
from robustkit.evaluation.checks.transfer import transfer
from robustkit.evaluation.compare import Bools, compare_flags
from robustkit.evaluation.rules import collapse_flags, convergence_flags, loss_flags, monotone_flags, restart_flags
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Flag

SHORT, STEPS = 10, 20
TRIES = 10
QUERIES = 50
KINDS = {"fgsm": "fgsm", "pgd": "pgd", "pgd-ce": "pgd", "square": "square", "noise": "noise"}


def probes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    seed: int,
    device: torch.device,
    surrogate: nn.Module | None = None,
    compressed: bool = False,
    one_step: bool = False,
) -> list[Flag]:
    """Return flags from small attacks on at most 64 examples x (N, ...) with labels y (N,).

    E2 one step against many, E3 queries and E4 noise against gradients, E5 images of a `surrogate` (E17 where the model
    was `compressed` from it), E6 growing eps, E8 twice the steps, E10 one more start, E11 two losses, E12 one step
    against ten (a collapse where the model was trained by `one_step`), E14 the attacks against a closed form.
    """
    found = self_test(threat.norm, device) if threat.norm in BALLS else []
    x, y = as_images(x[:EXAMPLES].to(device)), y[:EXAMPLES].to(device)
    with undisturbed(model), torch.enable_grad():
        seed_models(seed)
        with torch.no_grad():
            logits = checked_logits(model(x), len(x)).float()
        clean = (logits.argmax(1) == y) & torch.isfinite(logits).all(1)
        index = clean.nonzero().squeeze(1)
        if not len(index):
            return found
        tried = Tried(Batch(model, x[index], y[index], threat.to(device).select(index), seed), clean.cpu().numpy())
        try:
            compared, white_box = tried.by_gradients(one_step)
        except AttackError:
            compared, white_box = [], tried.clean
        if surrogate is not None:
            fooled = transfer(tried.batch, surrogate, tried.whole, white_box, compressed=compressed)
            compared += fooled
    return [*found, *(one.model_copy(update={"message": f"on {len(x)} images: {one.message}"}) for one in compared)]


@dataclass(frozen=True)
class Tried:
    """Attacks on the examples that a model gets right: `batch`, the ones that are `clean` (N,) of all."""

    batch: Batch
    clean: Bools

    def whole(self, right: Tensor) -> Bools:
        """Return which of all examples (N,) are right, from those of the batch (n,) that are."""
        found = self.clean.copy()
        found[self.clean] = right.cpu().numpy()
        return found

    def by_gradients(self, one_step: bool) -> tuple[list[Flag], Bools]:
        """Return what small attacks say of each other, and which examples those by gradients leave right.

        Raises:
            AttackError: the model's output has no gradient.
        """
        batch, generator = self.batch, self.batch.generator()
        start = random_start(batch.x, batch.threat, generator)
        climbed = falls_at(batch, "margin", 2 * STEPS, start, batch.threat)
        ten, twenty, forty = (self.whole(climbed > steps) for steps in (SHORT, STEPS, 2 * STEPS))
        entropy = self.whole(falls_at(batch, "ce", STEPS, start, batch.threat) > STEPS)
        single = self.whole(batch.right(fgsm(batch.model, batch.x, batch.y, batch.threat)))
        restarted = self.whole(_restarted(batch, climbed, generator) > STEPS)
        gradients = {"fgsm": single, "pgd": restarted, "pgd-ce": entropy}
        left = single & restarted & entropy
        found = [
            *compare_flags({**gradients, **self._without_gradients(left, generator)}, KINDS),
            *self._growing(ten, generator),
            *convergence_flags(twenty, forty, STEPS),
            *restart_flags(forty, restarted),
            *loss_flags(entropy, twenty),
            *collapse_flags(single, ten, trained_by_one_step=one_step),
        ]
        return found, left

    def _without_gradients(self, left: Bools, generator: torch.Generator) -> dict[str, Bools]:
        """Return what queries and noise leave right of what gradients left."""
        rows = torch.from_numpy(np.flatnonzero(left[self.clean])).to(self.batch.x.device)
        if not len(rows):
            return {}
        rest = self.batch.select(rows)
        x, y, threat = rest.x, rest.y, rest.threat
        tried = {"noise": noise(rest.model, x, y, threat, tries=TRIES, generator=generator)}
        if threat.norm in BALLS:
            tried["square"] = square(rest.model, x, y, threat, queries=QUERIES, generator=generator)
        found = {label: left.copy() for label in tried}
        for label, images in tried.items():
            found[label][left] = rest.right(images).cpu().numpy()
        return found

    def _growing(self, ten: Bools, generator: torch.Generator) -> list[Flag]:
        """E6 at half, once and twice eps, each attacked by itself."""

        def at(factor: float) -> Bools:
            threat = self.batch.threat.scaled(factor)
            start = random_start(self.batch.x, threat, generator)
            return self.whole(falls_at(self.batch, "margin", SHORT, start, threat) > SHORT)

        return monotone_flags([0.5, 1.0, 2.0], [at(0.5), ten, at(2.0)])


def _restarted(batch: Batch, climbed: Tensor, generator: torch.Generator) -> Tensor:
    """Return when each example falls (N,), where those that a climb has left over climb again from another start."""
    rows = (climbed > 2 * STEPS).nonzero().squeeze(1)
    if not len(rows):
        return climbed
    left = batch.select(rows)
    again = falls_at(left, "margin", STEPS, random_start(left.x, left.threat, generator), left.threat)
    return torch.zeros_like(climbed).scatter(0, rows, again)
