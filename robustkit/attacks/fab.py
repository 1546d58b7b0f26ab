"""FAB: the fast adaptive boundary attack, a minimum-norm attack (Croce & Hein 2020, arXiv 1907.02044)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.draws import Stream
from robustkit.attacks.hyperplane import onto_hyperplane
from robustkit.attacks.losses import margin_to, wrong_classes
from robustkit.attacks.projection import DUAL
from robustkit.attacks.search import input_gradient
from robustkit.attacks.threat import Norm, Threat

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}


def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: Norm,
    target: Tensor | None,
    *,
    steps: int = 100,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (images, distances): the closest images to x (n, ...) that the boundary to `target` (n,) gave.

    Without a target each step goes to the boundary that is closest to first order, at classes - 1 backwards a step.

    Images that the model gets wrong count, whatever it takes them for; where there was none, x comes back with an
    infinite distance. Each step projects the iterate and x onto the linearised boundary. 2 * steps forwards and `steps`
    backwards an example.

    Raises:
        AttackError: the model's output has no gradient.
    """
    x = x.detach()
    images = x if start is None else start
    best, shortest = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    for _ in range(steps):
        images = _step(model, x, images, y, target, norm)
        with torch.no_grad():
            fooled = model(images).argmax(1) != y
        length = _length(images - x, norm)
        closer = fooled & (length < shortest)
        best = torch.where(_wide(closer, x), images, best)
        shortest = torch.where(closer, length, shortest)
        images = torch.where(_wide(fooled, x), x + BETA * (images - x), images)
    return best, shortest


def _step(model: nn.Module, x: Tensor, images: Tensor, y: Tensor, target: Tensor | None, norm: Norm) -> Tensor:
    start = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(start).float()
        value, gradient = _closest(logits, start, y, norm) if target is None else _towards(logits, start, y, target)
    flat, clean = images.detach().flatten(1), x.flatten(1)
    # The boundary to first order: <gradient, z> = <gradient, images> - value.
    offset = (gradient * flat).sum(1) - value
    both = onto_hyperplane(torch.cat([flat, clean]), gradient.repeat(2, 1), offset.repeat(2), norm)
    from_here, from_clean = both.chunk(2)
    near, far = (_length(change, norm).clamp_min(1e-8) for change in (from_here, from_clean))
    alpha = (near / (near + far)).clamp(0, ALPHA_MAX)[:, None]
    moved = (flat + ETA * from_here) * (1 - alpha) + (clean + ETA * from_clean) * alpha
    return moved.clamp(0, 1).view(x.shape)


def _towards(logits: Tensor, images: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margin to the target (n,) and its gradient (n, D)."""
    reached = margin_to(logits, y, target)
    return reached.detach(), input_gradient(reached.sum(), images).flatten(1)


def _closest(logits: Tensor, images: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the same for the wrong class whose boundary is closest to first order."""
    others = wrong_classes(logits.detach(), y)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for rank in range(others.shape[1]):
        reached = margin_to(logits, y, others[:, rank])
        (wide,) = torch.autograd.grad(reached.sum(), images, retain_graph=rank + 1 < others.shape[1])
        gradient, value = wide.flatten(1), reached.detach()
        slope = torch.linalg.vector_norm(gradient, ord=DUAL[norm], dim=1)
        distance = value.abs() / (slope + 1e-12)
        if best is None:
            best = distance, value, gradient
            continue
        closer = distance < best[0]
        best = (
            torch.where(closer, distance, best[0]),
            torch.where(closer, value, best[1]),
            torch.where(closer[:, None], gradient, best[2]),
        )
    assert best is not None
    return best[1], best[2]


def _length(delta: Tensor, norm: Norm) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=ORDER[norm], dim=1)
    return length


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))


def random_near(x: Tensor, threat: Threat, stream: Stream, index: Tensor) -> Tensor:
    """Return random starts (n, ...) half as far from x as the ball reaches, for restarts."""
    reach = threat.eps_for(x) / 2
    drawn = stream.change(index, x, bounded=threat.norm == "linf")
    size = _length(drawn, threat.norm).clamp_min(1e-12).view(reach.shape)
    return (x + drawn / size * reach).clamp(0, 1)
