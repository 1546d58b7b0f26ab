"""All checks that look at a model before it is attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.losses import margin
from robustkit.attacks.threat import BALLS, Threat
from robustkit.evaluation.attacked import as_images, checked_logits
from robustkit.evaluation.checks.batch import EXAMPLES, Batch, flag, input_gradients, seed_models
from robustkit.evaluation.checks.dynamic import dynamic_defense
from robustkit.evaluation.checks.gradients import gradient_flags
from robustkit.evaluation.checks.images import off_grid
from robustkit.evaluation.checks.mode import arrived_training, batch_dependence, stays_training
from robustkit.evaluation.checks.outputs import few_classes, probabilities, randomness
from robustkit.evaluation.checks.smoothness import instability, usefulness
from robustkit.evaluation.checks.unbounded import unbounded
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Flag

BLIND = ("P8", "P9")


def preflight(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int, device: torch.device) -> list[Flag]:
    """Return flags of a model on at most 64 examples x (N, ...) with labels y (N,).

    P1 random logits, P2 probabilities instead of logits, P3 few classes, P4 a backward pass inside the forward, P5
    training mode, P6 images off the grid of 8 bits, P7 dependence on the batch, P8 values that are not finite, P9 zero
    gradients, P10 saturated cross-entropy, P11 gradients that mislead, P12 an unstable loss, E7 an unbounded attack
    that does not reach chance.
    """
    x = as_images(x[:EXAMPLES].to(device))
    y = y[:EXAMPLES].to(device)
    found = [*arrived_training(model), *off_grid(x)]
    with undisturbed(model), torch.no_grad():
        seed_models(seed)
        logits = checked_logits(model(x), len(x)).float()
        if not bool(torch.isfinite(logits).all()):
            return [flag("P8", "wrong", "logits are not finite: no accuracy of this model means anything; retrain it")]
        drawn = randomness(model, x, logits)
        found += [*stays_training(model), *drawn, *probabilities(logits), *few_classes(logits)]
        if not drawn:
            # A model that draws numbers answers otherwise each time, alone or in company.
            found += batch_dependence(model, x, logits)
        found += dynamic_defense(model, x)
        index = (logits.argmax(1) == y).nonzero().squeeze(1)
        right = Batch(model, x[index], y[index], threat.to(device).select(index), seed)
    if len(index):
        with undisturbed(model), torch.enable_grad():
            seed_models(seed)
            found += _of_gradients(right, logits.shape[1], drawn)
    return found


def _of_gradients(batch: Batch, classes: int, drawn: list[Flag]) -> list[Flag]:
    found = gradient_flags(batch)
    # Under l0 a value changes or it does not: there is no small step.
    local = not drawn and batch.threat.norm in BALLS
    if local and not any(one.id in BLIND and one.severity == "wrong" for one in found):
        # Where there is no gradient there is nothing to be said about its sign.
        found += usefulness(batch)
    if local:
        found += instability(batch)
    if any(one.severity == "wrong" for one in drawn):
        # What is left of an attack on answers that change by themselves says nothing about the gradients.
        return found
    if input_gradients(batch.select(torch.zeros_like(batch.y[:1])), batch.x[:1], margin) is None:
        return found
    return [*found, *unbounded(batch, classes)]
