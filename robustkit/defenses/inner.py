"""Inner maximisations of adversarial training: a fixed number of steps, input-only gradients, no host sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.attacks.losses import margin
from robustkit.attacks.projection import l2_direction, l2_norm, project_
from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import Logits, frozen

Score = Callable[[Tensor], Tensor]
"""Logits (N, classes) -> what the adversary wants large, one number an example (N,)."""
Loss = Literal["ce", "margin"]


def cross_entropy_score(target: Tensor) -> Score:
    """Return the cross-entropy to labels (N,) or to soft targets (N, classes) as a score."""
    return lambda logits: F.cross_entropy(logits.float(), target, reduction="none")


def margin_score(y: Tensor) -> Score:
    """Return the best wrong logit minus the logit of y (N,) as a score: positive where the example is fooled."""

    return lambda logits: margin(logits.float(), y)


def kl_score(clean_logits: Tensor) -> Score:
    """Return KL(clean || logits) to fixed clean logits (N, classes) as a score."""
    return lambda logits: kl_divergence(clean_logits, logits)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(softmax(p) || softmax(q)) of each example (N,) in nats; exactly 0 where the logits are the same."""
    log_p = F.log_softmax(p_logits.float(), dim=1)
    log_q = F.log_softmax(q_logits.float(), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def random_start(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Return x (N, ...) plus a uniform draw from the threat's linf or l2 ball, kept in [0, 1].

    One draw for the batch: quicker than the evaluation's draws an example, which do not depend on the batch.
    """
    if threat.norm == "linf":
        delta = torch.empty_like(x).uniform_(-1, 1, generator=generator) * threat.eps_for(x)
    else:
        direction = _gaussian_like(x, generator)
        # The radius of a uniform point of a d-dimensional ball is distributed as U**(1/d).
        share = torch.empty_like(threat.eps_for(x)).uniform_(generator=generator)
        radius = threat.eps_for(x) * share.pow(1 / x[0].numel())
        delta = direction / l2_norm(direction) * radius
    return (x + project_(delta, threat)).clamp(0, 1)


def near_start(x: Tensor, threat: Threat, generator: torch.Generator, spread: float) -> Tensor:
    """Return x (N, ...) plus Gaussian noise of standard deviation `spread`, inside the threat's ball and [0, 1]."""
    noise = _gaussian_like(x, generator).mul_(spread)
    return (x + project_(noise, threat)).clamp(0, 1)


def _gaussian_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise like x; on a CPU torch draws it ten times as slowly in channels last."""
    drawn = torch.empty_like(x, memory_format=torch.contiguous_format).normal_(generator=generator)
    return torch.empty_like(x).copy_(drawn)


def pgd_examples(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    threat: Threat,
    *,
    steps: int,
    alpha: float,
    generator: torch.Generator,
    restarts: int = 1,
    start: bool = True,
    loss: Loss = "ce",
) -> Tensor:
    """Return adversarial images for x (N, C, H, W) in [0, 1] by projected gradient ascent (Madry et al. 2018).

    target: labels (N,), or soft targets (N, classes) where loss is ce. alpha: step length in pixel units of the
    threat's norm. start: begin at a random point of the ball. Of several restarts each example keeps its worst.
    The model is in eval mode with frozen parameters meanwhile, and afterwards as it was.
    """
    score = margin_score(target) if loss == "margin" else cross_entropy_score(target)
    with frozen(model, passes=steps * restarts) as passes:
        best, highest = x, None
        for _ in range(restarts):
            begin = random_start(x, threat, generator) if start else x
            found = ascend(passes, score, x, begin, threat, steps=steps, alpha=alpha)
            if restarts == 1:
                return found
            with torch.no_grad():
                reached = score(passes(found))
            if highest is None:
                best, highest = found, reached
            else:
                better = (reached > highest).view(-1, *[1] * (x.dim() - 1))
                best, highest = torch.where(better, found, best), torch.maximum(reached, highest)
        return best


def n_fgsm_examples(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    eps: Tensor | float,
    *,
    alpha: Tensor | float,
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    """Return x (N, C, H, W) after one noisy sign step: N-FGSM (de Jorge et al. 2022).

    Uniform noise of +-noise*eps is added, one step of alpha along the gradient's sign is taken from there, and the
    sum is not clipped to the eps ball: it may reach noise*eps + alpha. Both images are kept in [0, 1].
    target: labels (N,) or soft targets (N, classes).
    """
    width = noise * Threat("linf", eps).eps_for(x)
    noisy = torch.empty_like(x).uniform_(-1, 1, generator=generator).mul_(width).add_(x).clamp_(0, 1)
    with frozen(model, passes=1) as passes:
        gradient = input_gradient(passes, cross_entropy_score(target), noisy)
    return gradient.sign_().mul_(alpha).add_(noisy).clamp_(0, 1)


def trades_examples(
    model: nn.Module,
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    alpha: float,
    generator: torch.Generator,
    spread: float = 0.001,
) -> Tensor:
    """Return images that maximise KL(p(x) || p(x_adv)) over the threat's ball (Zhang et al. 2019).

    The ascent starts at x plus Gaussian noise of standard deviation `spread`, because the gradient at x itself is 0.
    """
    begin = near_start(x, threat, generator, spread)
    with frozen(model, passes=steps) as passes:
        with torch.no_grad():
            clean = passes(x)
        return ascend(passes, kl_score(clean), x, begin, threat, steps=steps, alpha=alpha)


def ascend(
    model: Logits, score: Score, x: Tensor, start: Tensor, threat: Threat, *, steps: int, alpha: float
) -> Tensor:
    """Take `steps` steps of length alpha up the score from `start`, each projected onto ball and box; return the last.

    model: what `frozen` yields.
    """
    found = start
    if threat.norm == "linf":
        eps = threat.eps_for(x)
        low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
        for _ in range(steps):
            found = torch.add(found, input_gradient(model, score, found).sign_(), alpha=alpha)
            torch.clamp(found, low, high, out=found)
        return found
    for _ in range(steps):
        direction = l2_direction(input_gradient(model, score, found))
        found = (x + project_(found + alpha * direction - x, threat)).clamp(0, 1)
    return found


def input_gradient(model: Logits, score: Score, x: Tensor) -> Tensor:
    """Return the gradient of the summed score with respect to x, shaped like x; no parameter's .grad is touched."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(model(leaf)).sum(), leaf)
    return gradient.detach()
