"""Small attacks that are held against each other: what one finds, the others should find too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import fgsm
from robustkit.attacks.noise import noise
from robustkit.attacks.projection import random_start
from robustkit.attacks.square import square
from robustkit.attacks.threat import Threat
from robustkit.errors import AttackError
from robustkit.evaluation.attacked import as_images, checked_logits
from robustkit.evaluation.checks.batch import EXAMPLES, Batch
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
    found = self_test(threat.norm, device)
    x, y = as_images(x[:EXAMPLES].to(device)), y[:EXAMPLES].to(device)
    with undisturbed(model), torch.enable_grad():
        with torch.no_grad():
            logits = checked_logits(model(x), len(x)).float()
        right = (logits.argmax(1) == y) & torch.isfinite(logits).all(1)
        index = right.nonzero().squeeze(1)
        if not len(index):
            return found
        batch = Batch(model, x[index], y[index], threat.to(device).select(index), seed)
        compared = _compared(batch, surrogate, compressed=compressed, one_step=one_step)
    seen = [one.model_copy(update={"message": f"on {len(index)} images: {one.message}"}) for one in compared]
    return [*found, *seen]


def _compared(batch: Batch, surrogate: nn.Module | None, *, compressed: bool, one_step: bool) -> list[Flag]:
    everyone = np.ones(len(batch.y), dtype=np.bool_)
    try:
        found, white_box = _by_gradients(batch, one_step)
    except AttackError:
        found, white_box = [], everyone
    if surrogate is not None:
        found += transfer(batch, surrogate, white_box, compressed=compressed)
    return found


def _by_gradients(batch: Batch, one_step: bool) -> tuple[list[Flag], Bools]:
    """Return the flags, and which examples all attacks by gradients left right."""
    generator = batch.generator()
    start = random_start(batch.x, batch.threat, generator)
    climbed = falls_at(batch, "margin", 2 * STEPS, start, batch.threat)
    entropy = falls_at(batch, "ce", STEPS, start, batch.threat)
    at_ten, at_twenty, at_forty = (_right(climbed, steps) for steps in (SHORT, STEPS, 2 * STEPS))
    by_entropy = _right(entropy, STEPS)
    again = _one_more_start(batch, at_forty, generator)
    single = _held(batch, fgsm(batch.model, batch.x, batch.y, batch.threat))
    many = {"pgd": at_forty & again, "pgd-ce": by_entropy}
    white_box = many["pgd"] & by_entropy
    outside = _without_gradients(batch, white_box, generator)
    kinds = {"fgsm": "fgsm", "pgd": "pgd", "pgd-ce": "pgd", "square": "square", "noise": "noise"}
    found = [
        *compare_flags({"fgsm": single, **many, **outside}, kinds),
        *_growing(batch, at_ten, generator),
        *convergence_flags(at_twenty, at_forty, STEPS),
        *restart_flags(at_forty, at_forty & again),
        *loss_flags(by_entropy, at_twenty),
        *collapse_flags(single, at_ten, trained_by_one_step=one_step),
    ]
    return found, white_box & single


def _right(falls: Tensor, steps: int) -> Bools:
    right: Bools = (falls > steps).cpu().numpy()
    return right


def _held(batch: Batch, images: Tensor) -> Bools:
    """Return which images the model is right on."""
    with torch.no_grad():
        right: Bools = (batch.model(images).argmax(1) == batch.y).cpu().numpy()
    return right


def _left(batch: Batch, right: Bools) -> tuple[Tensor, Batch]:
    index = torch.from_numpy(np.flatnonzero(right)).to(batch.x.device)
    return index, batch.select(index)


def _one_more_start(batch: Batch, right: Bools, generator: torch.Generator) -> Bools:
    """Return which of the examples that are left stay right under a climb from another start."""
    index, left = _left(batch, right)
    result = right.copy()
    if len(index):
        start = random_start(left.x, left.threat, generator)
        result[index.cpu().numpy()] = _right(falls_at(left, "margin", STEPS, start, left.threat), STEPS)
    return result


def _without_gradients(batch: Batch, right: Bools, generator: torch.Generator) -> dict[str, Bools]:
    """Return what queries and noise leave right of what gradients left."""
    index, left = _left(batch, right)
    found = {"square": right.copy(), "noise": right.copy()}
    if len(index):
        x, y, threat, rows = left.x, left.y, left.threat, index.cpu().numpy()
        searched = square(left.model, x, y, threat, queries=QUERIES, generator=generator)
        found["square"][rows] = _held(left, searched)
        found["noise"][rows] = _held(left, noise(left.model, x, y, threat, tries=TRIES, generator=generator))
    return found


def _growing(batch: Batch, at_ten: Bools, generator: torch.Generator) -> list[Flag]:
    """E6 at half, once and twice eps, each attacked by itself."""
    by_factor = {1.0: at_ten}
    for factor in (0.5, 2.0):
        threat = batch.threat.scaled(factor)
        start = random_start(batch.x, threat, generator)
        by_factor[factor] = _right(falls_at(batch, "margin", SHORT, start, threat), SHORT)
    factors = sorted(by_factor)
    return monotone_flags(factors, [by_factor[factor] for factor in factors])
