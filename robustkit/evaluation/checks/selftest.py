"""E14: attacks on models whose robustness is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from robustkit.attacks.cascade import Cascade
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Attack, Norm, Threat
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.checks.batch import flag
from robustkit.results import Flag

CLASSES, PIXELS, IMAGES = 4, 16, 32
SEED = 20_260_102
SPREAD = 0.02
"""Images lie this near to a gray one, so that no boundary is so far that the box would matter."""
OUTSIDE, INSIDE = 0.98, 1.02
"""Budgets as a share of the exact distance to the boundary."""


def linear_oracle(device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a linear model, images (N, D) in [0, 1] and the classes (N,) that it gives them."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(CLASSES, PIXELS, generator=generator)
    x = 0.5 + SPREAD * torch.randn(IMAGES, PIXELS, generator=generator)
    # Without weights drawn from the global generator, which is not ours.
    model = skip_init(nn.Linear, PIXELS, CLASSES)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(-0.5 * weight.sum(1))
        y = model(x).argmax(1)
    return model.to(device).eval().requires_grad_(False), x.to(device), y.to(device)


def boundary_distance(model: nn.Linear, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Return each image's exact distance to the nearest other class (N,), the box left aside.

    The margin to a class over the dual norm of the difference of weights.
    """
    dual = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[norm]
    logits = model(x)
    margins = logits.gather(1, y[:, None]) - logits
    between = torch.linalg.vector_norm(model.weight[None] - model.weight[y][:, None], ord=dual, dim=2)
    distance = margins / between.clamp_min(1e-12)
    nearest: Tensor = distance.scatter(1, y[:, None], torch.inf).amin(1)
    return nearest


def misses(attack: Attack, norm: Norm, device: torch.device) -> tuple[int, int]:
    """Return on how many of 32 images an attack misses what is there, and finds what cannot be there."""
    model, x, y = linear_oracle(device)
    distance = boundary_distance(model, x, y, norm)
    clean = clean_outcome(model, x, y, batch_size=IMAGES, device=device)
    found = []
    for share in (INSIDE, OUTSIDE):
        threat = Threat(norm, distance * share)
        outcome = attack_outcome(
            model, x, y, attack, threat, clean=clean, seed=SEED, label="E14", batch_size=IMAGES, device=device
        )
        found.append(int(outcome.correct.sum()))
    return found[0], IMAGES - found[1]


def self_test(norm: Norm, device: torch.device) -> list[Flag]:
    """E14: robustkit's own attacks, on this machine, against a linear model (the idea of Zimmermann et al. 2022, arXiv
    2206.13991: an attack must find what is known to be there)."""
    attacks: dict[str, Attack] = {"pgd": Pgd(steps=20, restarts=CLASSES), "cascade": Cascade("quick")}
    return [one for label, attack in attacks.items() for one in oracle_flags(label, attack, norm, device)]


def oracle_flags(label: str, attack: Attack, norm: Norm, device: torch.device) -> list[Flag]:
    """E14 for one attack, yours perhaps, under the norm `linf`, `l2` or `l1`."""
    missed, impossible = misses(attack, norm, device)
    if not missed and not impossible:
        return []
    message = (
        f"{label} on a linear model whose robustness is known in closed form ({norm}): of {IMAGES} images it misses "
        f"{missed} that can be fooled, and fools {impossible} that cannot; correct the attack before anything is "
        "attacked with it"
    )
    return [flag("E14", "wrong", message)]
