"""Projection onto the adversary's ball and onto the image box, a batch at a time and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks import draws
from robustkit.attacks.threat import Threat

DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
"""Order of the norm of a gradient that says how much a unit of a norm can change a linear function."""
L2_ROUNDS = 3
L1_ROUNDS = 40


def project_(delta: Tensor, threat: Threat) -> Tensor:
    """Project delta (N, ...) onto the threat's ball in place, each example by itself, and return it."""
    eps = threat.eps_for(delta)
    if threat.norm == "linf":
        return torch.clamp(delta, -eps, eps, out=delta)
    if threat.norm == "l2":
        # A shrunk example keeps its direction; the tiny floor only avoids 0/0 for delta == 0.
        return delta.mul_((eps / l2_norm(delta)).clamp(max=1.0))
    if threat.norm == "l0":
        return delta.mul_(largest(delta.square(), eps))
    return delta.copy_(_onto_l1(delta, torch.full_like(delta, torch.inf), eps))


def within(x: Tensor, adversarial: Tensor, threat: Threat) -> Tensor:
    """Return the closest images to `adversarial` (N, ...) in the ball around x and in [0, 1], by Euclidean distance.

    The projection is onto the intersection of ball and box. Onto one after the other, an l2 or l1 attack would lose
    the part of its budget that the box cuts off.
    """
    delta, eps = adversarial - x, threat.eps_for(x)
    if threat.norm == "linf":
        return (x + delta.clamp(-eps, eps)).clamp(0, 1)
    if threat.norm == "l2":
        return (x + _onto_l2(delta, x, eps)).clamp(0, 1)
    if threat.norm == "l0":
        held = delta.clamp(-x, 1 - x)
        # What keeping a value brings the image nearer to where it was to go.
        kept = largest(delta.square() - (delta - held).square(), eps)
        return torch.where(kept, x + held, x).clamp(0, 1)
    room = torch.where(delta > 0, 1 - x, x)
    return (x + _onto_l1(delta, room, eps)).clamp(0, 1)


def distances(delta: Tensor, norm: str) -> Tensor:
    """Return the norm of each example's change (N,); under l0 how many values change."""
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0, "l0": 0.0}[norm]
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)
    return norms


def largest(values: Tensor, count: Tensor) -> Tensor:
    """Return which are the `count` (N, 1, ..., 1) largest values of each example of `values` (N, ...)."""
    rank = values.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view(values.shape)
    return rank < count


def onto_l1_ball(delta: Tensor, size: float) -> Tensor:
    """Return the closest points to delta (N, ...) whose absolute values sum up to at most `size`."""
    eps = torch.full_like(delta.flatten(1)[:, :1], size).view(-1, *[1] * (delta.dim() - 1))
    return _onto_l1(delta, torch.full_like(delta, torch.inf), eps)


def _onto_l2(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Return clip(s * delta) to the box with the largest s <= 1 that keeps the norm within eps.

    That is the projection (its optimality conditions say so). s is found by solving for it with those pixels held that
    the box holds already; it never overshoots, because a larger s only lets the box hold more of them.
    """
    shape = (-1, *[1] * (delta.dim() - 1))
    low, high, square = -x, 1 - x, delta.square()
    scale = (eps / square.flatten(1).sum(1).sqrt().clamp_min(1e-12).view(shape)).clamp(max=1.0)
    for _ in range(L2_ROUNDS):
        moved = delta * scale
        held = moved.clamp(low, high)
        free = (square * (held == moved)).flatten(1).sum(1).view(shape)
        spent = held.square_().flatten(1).sum(1).view(shape) - scale.square() * free
        wanted = ((eps.square() - spent).clamp_min(0) / free.clamp_min(1e-24)).sqrt()
        scale = torch.maximum(scale, wanted.clamp(max=1.0))
    return (delta * scale).clamp(low, high)


def _onto_l1(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """Return sign(delta) * min(max(|delta| - t, 0), room) with the smallest t >= 0 that keeps the norm within eps.

    That is the projection onto l1 ball and box (Croce & Hein 2021, arXiv 2103.01208, proposition 2.1); t by bisection.
    """
    shape = (-1, *[1] * (delta.dim() - 1))
    size = delta.abs()
    low = torch.zeros_like(eps)
    high = size.flatten(1).amax(1).view(shape)
    fits = torch.minimum(size, room).flatten(1).sum(1).view(shape) <= eps
    for _ in range(L1_ROUNDS):
        middle = (low + high) / 2
        spent = torch.minimum((size - middle).clamp_min(0), room).flatten(1).sum(1).view(shape)
        low, high = torch.where(spent > eps, middle, low), torch.where(spent > eps, high, middle)
    threshold = torch.where(fits, torch.zeros_like(high), high)
    return delta.sign() * torch.minimum((size - threshold).clamp_min(0), room)


def l2_norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each example of x (N, ...), shaped (N, 1, ..., 1) and never below 1e-12."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_min(1e-12)
    return norm.view(-1, *[1] * (x.dim() - 1))


def l2_direction(gradient: Tensor) -> Tensor:
    """Return each example's gradient (N, ...) at an L2 norm of 1, however small it is; 0 where it is 0."""
    # The squares of small entries are zero in float32, and the norm has a floor: the largest entry is made 1 first.
    peak = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
    scaled = gradient / peak.view(-1, *[1] * (gradient.dim() - 1))
    return scaled / l2_norm(scaled)


def random_start(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return x (N, ...) plus a uniform draw from the threat's ball, kept in [0, 1].

    An example's draw depends on its pixels and the generator, not on the rest of the batch.
    """
    if threat.norm == "linf":
        delta = (2 * draws.uniform(x, generator) - 1) * threat.eps_for(x)
    elif threat.norm == "l0":
        return _redrawn(x, threat, generator, draws.uniform(x, generator))
    else:
        delta = _surface(x, threat, generator)
        # The radius of a uniform point of a d-dimensional ball is distributed as U**(1/d).
        delta = delta * draws.radial(x, generator).pow(1 / max(1, x[:1].numel()))
    return within(x, x + delta, threat)


def random_extreme(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return x (N, ...) plus noise as large as the ball allows, kept in [0, 1].

    A corner for linf, the surface for l2 and l1, values of 0 and 1 for l0.
    """
    if threat.norm == "linf":
        delta = torch.where(draws.uniform(x, generator) < 0.5, -1.0, 1.0) * threat.eps_for(x)
        return (x + delta).clamp(0, 1)
    if threat.norm == "l0":
        return _redrawn(x, threat, generator, (draws.uniform(x, generator) < 0.5).to(x.dtype))
    return within(x, x + _surface(x, threat, generator), threat)


def _redrawn(x: Tensor, threat: Threat, generator: torch.Generator, values: Tensor) -> Tensor:
    """Return x (N, ...) with as many of its values, drawn at random, replaced as an l0 budget allows."""
    return torch.where(largest(draws.uniform(x, generator), threat.eps_for(x)), values, x)


def _surface(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return a uniform draw from the surface of the l2 or l1 ball."""
    if threat.norm == "l2":
        direction = draws.normal(x, generator)
        return direction / l2_norm(direction) * threat.eps_for(x)
    signed = 2 * draws.uniform(x, generator) - 1
    # Exponential magnitudes over their sum are uniform on the simplex; the sign is independent of them.
    size = -torch.log1p(-signed.abs().clamp(max=1 - 1e-7))
    total = size.flatten(1).sum(1).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
    return signed.sign() * size / total * threat.eps_for(x)
