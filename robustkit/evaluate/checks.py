"""Sanity checks on a model before its robustness is believed. Ids as in Carlini et al. 2019's checklist, ours added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import pgd
from robustkit.attacks.losses import margin
from robustkit.attacks.threat import Threat
from robustkit.evaluate.attacked import as_images
from robustkit.evaluate.undisturbed import undisturbed
from robustkit.results import Flag, Severity

EXAMPLES = 64
REPEATS = 3
RANDOM_TOLERANCE = 1e-4
BATCH_TOLERANCE = 1e-3
ZERO_DOUBT = 0.01
ZERO_WRONG = 0.10
UNBOUNDED_STEPS = 40
UNBOUNDED_RESTARTS = 2


def preflight(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int, device: torch.device) -> list[Flag]:
    """Return flags of a model on at most 64 examples x (N, ...) with labels y (N,).

    P1 random logits, P2 probabilities instead of logits, P7 dependence on the batch, P8 values that are not finite,
    P9 zero gradients, E7 an unbounded attack that does not reach chance.
    """
    x = as_images(x[:EXAMPLES].to(device))
    y = y[:EXAMPLES].to(device)
    with undisturbed(model), torch.no_grad():
        logits = model(x).float()
        if not bool(torch.isfinite(logits).all()):
            return [_flag("P8", "wrong", "logits are not finite: no accuracy of this model means anything; retrain it")]
        found = [
            *_random(model, x, logits),
            *_probabilities(logits),
            *_batch_dependence(model, x, logits),
        ]
        right = logits.argmax(1) == y
        x, y = x[right], y[right]
    if len(y):
        with undisturbed(model), torch.enable_grad():
            found += _zero_gradients(model, x, y)
            found += _unbounded(model, x, y, logits.shape[1], seed)
    return found


def _flag(kind: str, severity: Severity, message: str) -> Flag:
    return Flag(id=kind, severity=severity, message=message)


def _random(model: nn.Module, x: Tensor, logits: Tensor) -> list[Flag]:
    scale = logits.norm(dim=1).clamp_min(1e-12)
    again = torch.stack([model(x).float() for _ in range(REPEATS)])
    change = float(((again - logits).norm(dim=2) / scale).max())
    if change <= RANDOM_TOLERANCE:
        return []
    message = (
        f"the same images give other logits each time (relative change {change:.2g}): attack the average of several "
        "passes (expectation over transformation), else the attack sees noise"
    )
    return [_flag("P1", "doubt", message)]


def _probabilities(logits: Tensor) -> list[Flag]:
    sums = bool(((logits.sum(1) - 1).abs() < 1e-4).all()) and bool((logits >= -1e-5).all())
    logs = bool((logits.logsumexp(1).abs() < 1e-4).all()) and bool((logits <= 1e-5).all())
    if sums:
        return [
            _flag("P2", "doubt", "outputs are probabilities: their gradients vanish; return the logits before softmax")
        ]
    if logs:
        return [_flag("P2", "note", "outputs are log-probabilities; return logits, some attacks fail on these")]
    return []


def _batch_dependence(model: nn.Module, x: Tensor, logits: Tensor) -> list[Flag]:
    few = min(4, len(x))
    alone = torch.cat([model(x[number : number + 1]).float() for number in range(few)])
    scale = logits[:few].norm(dim=1).clamp_min(1e-6)
    change = float(((alone - logits[:few]).norm(dim=1) / scale).max())
    if change <= BATCH_TOLERANCE:
        return []
    message = (
        f"logits depend on the rest of the batch (relative change {change:.2g}): batch norm in training mode? "
        "Put the model into eval mode"
    )
    return [_flag("P7", "wrong", message)]


def _gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    start = x.clone().requires_grad_(True)
    logits = model(start).float()
    if not logits.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss(logits, y).sum(), start, allow_unused=True)
    return None if gradient is None else gradient.flatten(1)


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Flag]:
    gradient = _gradient(model, x, y, margin)
    if gradient is None:
        message = (
            "the logits do not depend on the images by gradients: attack a differentiable surrogate, or by queries"
        )
        return [_flag("P9", "wrong", message)]
    if not bool(torch.isfinite(gradient).all()):
        return [_flag("P8", "wrong", "input gradients are not finite: gradient attacks cannot work on this model")]
    share = float((gradient.abs().amax(1) == 0).float().mean())
    if share <= ZERO_DOUBT:
        return []
    message = (
        f"{share:.0%} of the examples have an input gradient of exactly zero: gradient attacks are blind there; attack "
        "a smooth surrogate, or use a gradient-free attack"
    )
    return [_flag("P9", "wrong" if share > ZERO_WRONG else "doubt", message)]


def _unbounded(model: nn.Module, x: Tensor, y: Tensor, classes: int, seed: int) -> list[Flag]:
    """With the whole pixel range to move in, every classifier must fall to chance."""
    probe = torch.zeros(1, *x.shape[1:], device=x.device, requires_grad=True)
    if not model(probe).requires_grad:
        return []
    generator = torch.Generator(device=x.device).manual_seed(seed)
    found = pgd(
        model,
        x,
        y,
        Threat("linf", 1.0),
        steps=UNBOUNDED_STEPS,
        restarts=UNBOUNDED_RESTARTS,
        relative_step=2.5 / UNBOUNDED_STEPS,
        loss="margin",
        generator=generator,
    )
    with torch.no_grad():
        left = float((model(found).argmax(1) == y).float().mean())
    if left <= 1 / classes:
        return []
    message = (
        f"an unbounded attack (linf, eps 1) leaves {left:.0%}, chance is {1 / classes:.0%}: the gradients do not lead "
        "anywhere, so no gradient attack on this model can be believed; use a surrogate or a gradient-free attack"
    )
    return [_flag("E7", "wrong", message)]
