"""Sanity checks on a model before its robustness is believed: seconds on one batch.

After Athalye et al. 2018 (arXiv 1802.00420, section 3.1), Carlini et al. 2019 (arXiv 1902.06705) and Pintor et al. 2022
(arXiv 2106.09947).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from robustkit.attacks.gradient import pgd
from robustkit.attacks.losses import cross_entropy, margin
from robustkit.attacks.projection import random_start
from robustkit.attacks.threat import Threat
from robustkit.evaluation.attacked import as_images, checked_logits
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Flag, Severity

EXAMPLES = 64
REPEATS = 3
RANDOM_TOLERANCE = 1e-4
BATCH_TOLERANCE = 1e-3
ZERO_DOUBT = 0.01
ZERO_WRONG = 0.10
MODE_DEPENDENT = (_DropoutNd, _NormBase)
UNBOUNDED_STEPS = 40
UNBOUNDED_RESTARTS = 2


def preflight(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, seed: int, device: torch.device) -> list[Flag]:
    """Return flags of a model on at most 64 examples x (N, ...) with labels y (N,).

    P1 random logits, P2 probabilities instead of logits, P5 training mode, P7 dependence on the batch, P8 values that
    are not finite, P9 zero gradients, P10 saturated cross-entropy, E7 an unbounded attack that does not reach chance.
    """
    x = as_images(x[:EXAMPLES].to(device))
    y = y[:EXAMPLES].to(device)
    found = _mode(model)
    with undisturbed(model), torch.no_grad():
        logits = checked_logits(model(x), len(x)).float()
        if not bool(torch.isfinite(logits).all()):
            return [_flag("P8", "wrong", "logits are not finite: no accuracy of this model means anything; retrain it")]
        found += [
            *_stuck_mode(model),
            *_random(model, x, logits),
            *_probabilities(logits),
            *_batch_dependence(model, x, logits),
        ]
        right = logits.argmax(1) == y
        index = right.nonzero().squeeze(1)
        x, y, budget = x[index], y[index], threat.to(device).select(index)
    if len(y):
        with undisturbed(model), torch.enable_grad():
            found += _gradients(model, x, y, budget, seed)
            found += _unbounded(model, x, y, logits.shape[1], seed)
    return found


def _flag(kind: str, severity: Severity, message: str) -> Flag:
    return Flag(id=kind, severity=severity, message=message)


def _mode(model: nn.Module) -> list[Flag]:
    names = sorted({type(one).__name__ for one in model.modules() if one.training and isinstance(one, MODE_DEPENDENT)})
    if not names:
        return []
    message = (
        f"the model came in training mode ({', '.join(names)}); it was evaluated in eval mode, so call model.eval() "
        "where you use it, or its accuracy will be another"
    )
    return [_flag("P5", "note", message)]


def _stuck_mode(model: nn.Module) -> list[Flag]:
    stuck = sorted({type(module).__name__ for module in model.modules() if module.training})
    if not stuck:
        return []
    message = (
        f"{', '.join(stuck)} stays in training mode after model.eval(): dropout or batch statistics are at work while "
        "it is attacked; let train() pass the mode on"
    )
    return [_flag("P5", "wrong", message)]


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


def _gradients(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int) -> list[Flag]:
    """Look at the gradients at the images and at a random point of the ball around each."""
    near = random_start(x, threat, torch.Generator(device=x.device).manual_seed(seed))
    points, labels = torch.cat([x, near]), torch.cat([y, y])
    gradient = _gradient(model, points, labels, margin)
    if gradient is None:
        message = (
            "the logits do not depend on the images by gradients: attack a differentiable surrogate, or by queries"
        )
        return [_flag("P9", "wrong", message)]
    if not bool(torch.isfinite(gradient).all()):
        return [_flag("P8", "wrong", "input gradients are not finite: gradient attacks cannot work on this model")]
    dead = gradient.abs().amax(1) == 0
    share = float(dead.float().mean())
    if share <= ZERO_DOUBT:
        return _saturated(model, points, labels)
    message = (
        f"{share:.0%} of the examples have an input gradient of exactly zero: gradient attacks are blind there; attack "
        "a smooth surrogate, or use a gradient-free attack"
    )
    return [_flag("P9", "wrong" if share > ZERO_WRONG else "doubt", message)]


def _saturated(model: nn.Module, x: Tensor, y: Tensor) -> list[Flag]:
    gradient = _gradient(model, x, y, cross_entropy)
    share = 0.0 if gradient is None else float((gradient.abs().amax(1) == 0).float().mean())
    if share <= ZERO_WRONG:
        return []
    message = (
        f"cross-entropy is saturated: its gradient is exactly zero on {share:.0%} of the examples, the margin's not; "
        "attack with loss: margin, and do not quote attacks that use cross-entropy"
    )
    return [_flag("P10", "doubt", message)]


def _unbounded(model: nn.Module, x: Tensor, y: Tensor, classes: int, seed: int) -> list[Flag]:
    """With the whole pixel range to move in, every classifier must fall to chance."""
    if _gradient(model, x[:1], y[:1], margin) is None:
        return []
    generator = torch.Generator(device=x.device).manual_seed(seed)
    found = pgd(
        model,
        x,
        y,
        Threat("linf", 1.0),
        steps=UNBOUNDED_STEPS,
        restarts=UNBOUNDED_RESTARTS,
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
