"""Checks that the loss is one that gradients can climb: the gradient tells the truth, and noise changes little."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.losses import as_logits, margin
from robustkit.attacks.projection import random_start
from robustkit.attacks.search import steepest
from robustkit.evaluation.checks.batch import Batch, flag
from robustkit.results import Flag

STEP, LONGEST_STEP = 1 / 20, 1 / 4
"""Of a finite difference, as a share of eps: longer only where the model's number type cannot see so little."""
RESOLVED = 8
"""So many units in the last place of 1 a pixel must move."""
DIRECTIONS = 4
CLEAR = 0.5
"""A random direction counts where the gradient promises at least this many times what it does on average."""
WRONG_SIGN_DOUBT = 0.10
WRONG_SIGN_WRONG = 0.20
DRAWS = 10
UNSTABLE_NOTE = 0.10
UNSTABLE_DOUBT = 0.25


def usefulness(batch: Batch) -> list[Flag]:
    """P11: central finite differences of the margin, along the gradient and in random directions.

    A gradient that is wrong about the sign of a change a twentieth of eps away is shattered (Athalye et al. 2018,
    arXiv 1802.00420, section 3). 2 + 8 forwards and one gradient an example.
    """
    gradient = _gradient(batch)
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        return []
    length, seen = _length(batch)
    usable = seen & (gradient.flatten(1).abs().amax(1) > 0)
    if not bool(usable.any()):
        return []
    uphill = _change(batch, steepest(batch.x, gradient, batch.threat, length))
    missed = float((uphill <= 0)[usable].float().mean())
    lied = _random_lies(batch, gradient, length, usable)
    worst = max(missed, lied)
    if worst <= WRONG_SIGN_DOUBT:
        return []
    message = (
        f"gradients point the wrong way: a small step along them lowers the loss on {missed:.0%} of the examples, and "
        f"{lied:.0%} of random small steps change it against their word (shattered gradients?); attack a smooth "
        "surrogate by robustkit.attacks.adaptive.Bpda, or by queries"
    )
    return [flag("P11", "wrong" if worst > WRONG_SIGN_WRONG else "doubt", message)]


def _length(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the length of a step (N, 1, ..., 1), and for which examples (N,) the model's type resolves it."""
    dtype = next((one.dtype for one in batch.model.parameters() if one.is_floating_point()), torch.float32)
    eps = batch.threat.eps_for(batch.x)
    pixels = batch.x[:1].numel()
    widest = {"linf": 1.0, "l2": pixels**0.5, "l1": float(pixels)}[batch.threat.norm]
    # A step along signs moves each pixel by its length over this.
    least = RESOLVED * torch.finfo(dtype).eps * widest
    share = (least / eps.clamp_min(1e-12)).clamp(STEP, LONGEST_STEP)
    return eps * share, (eps * LONGEST_STEP >= least).flatten()


def _gradient(batch: Batch) -> Tensor | None:
    start = batch.x.clone().requires_grad_(True)
    logits = as_logits(batch.model(start).float())
    if not logits.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(margin(logits, batch.y).sum(), start, allow_unused=True)
    return gradient


def _reached(batch: Batch, x: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(as_logits(batch.model(x).float()), batch.y)


def _change(batch: Batch, step: Tensor) -> Tensor:
    """Return by how much the margin grows from x - step to x + step (N,)."""
    return _reached(batch, batch.x + step) - _reached(batch, batch.x - step)


def _random_lies(batch: Batch, gradient: Tensor, length: Tensor, usable: Tensor) -> float:
    """Return the share of the random steps that the gradient is clear about which change the margin against it."""
    generator = batch.generator()
    norm = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[batch.threat.norm]
    against = counted = torch.zeros((), device=batch.x.device)
    for _ in range(DIRECTIONS):
        signs = torch.empty_like(batch.x).bernoulli_(0.5, generator=generator) * 2 - 1
        size = torch.linalg.vector_norm(signs.flatten(1), ord=norm, dim=1).view(length.shape)
        step = signs / size * length
        promised = (gradient * step).flatten(1).sum(1)
        usual = gradient.flatten(1).norm(dim=1) * step.flatten(1).abs().amax(1)
        clear = usable & (promised.abs() > CLEAR * usual)
        against = against + (clear & (_change(batch, step) * promised <= 0)).sum()
        counted = counted + clear.sum()
    return float(against / counted.clamp_min(1))


def instability(batch: Batch) -> list[Flag]:
    """P12: how much the margin changes, relative to itself and at most by all of it, by noise of half of eps.

    The unstable predictions of Pintor et al. 2022 (arXiv 2106.09947, section 3). 1 + 10 forwards an example.
    """
    here = _reached(batch, batch.x)
    generator, half = batch.generator(), batch.threat.scaled(0.5)
    changes = torch.stack(
        [(_reached(batch, random_start(batch.x, half, generator)) - here).abs() for _ in range(DRAWS)]
    )
    relative = float((changes / here.abs().clamp_min(1e-12)).clamp(max=1).mean())
    if not relative > UNSTABLE_NOTE:
        return []
    message = (
        f"random noise of half of eps changes the margin by {relative:.0%} on average: the loss is rough; use more "
        "restarts, and an attack without gradients beside them"
    )
    return [flag("P12", "doubt" if relative > UNSTABLE_DOUBT else "note", message)]
