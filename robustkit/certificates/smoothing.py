"""Randomized smoothing: an L2 certificate of the smoothed classifier (Cohen et al. 2019, arXiv 1902.02918)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit.attacks.draws import Stream
from robustkit.attacks.threat import Norm, Threat
from robustkit.certificates.certificate import ABSTAINED, Certified
from robustkit.evaluation.attacked import checked_logits
from robustkit.params import OpenShare, PositiveFloat, PositiveInt


def lower_confidence_bound(successes: NDArray[np.int64], trials: int, alpha: float) -> NDArray[np.float64]:
    """Return the one-sided Clopper-Pearson bounds (N,): each is above its true share with probability alpha at most.

    LowerConfBound(k, n, 1 - alpha) of Cohen et al. 2019, section 3.2.2.
    """
    from scipy.special import betaincinv

    counts = np.asarray(successes, dtype=np.float64)
    # Zero successes bound nothing, and have no beta distribution.
    bounds = betaincinv(np.maximum(counts, 1), trials - np.maximum(counts, 1) + 1, alpha)
    return np.where(counts > 0, bounds, 0.0)


def certified_radius(sigma: float, bound: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sigma Phi^-1(bound) (N,), 0 where the bound is not above one half (Cohen et al. 2019, theorem 1)."""
    from scipy.special import ndtri

    return np.where(bound > 0.5, sigma * ndtri(np.maximum(bound, 0.5)), 0.0)


def sample_under_noise(model: nn.Module, x: Tensor, stream: Stream, sigma: float, samples: int) -> Tensor:
    """Return how often each class is predicted for x (N, ...) plus Gaussian noise of deviation sigma (N, classes).

    The noisy images are not cut to [0, 1], as the theorem asks; a draw whose logits are not finite counts for no class.
    An example's noise depends on its pixels and the stream, not on the rest of the batch.
    """
    index = torch.arange(len(x), device=x.device)
    counts: Tensor | None = None
    for _ in range(samples):
        noise = stream.normal(index, x[:1].numel()).view(x.shape)
        logits = checked_logits(model(x + sigma * noise.to(x.dtype)), len(x))
        if counts is None:
            counts = torch.zeros(logits.shape, dtype=torch.int64, device=x.device)
        finite = torch.isfinite(logits).all(1, keepdim=True)
        counts.scatter_add_(1, logits.argmax(1, keepdim=True), finite.to(torch.int64))
    assert counts is not None
    return counts


def smoothed_certificate(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    first: int,
    samples: int,
    alpha: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the smoothed classifier's class (N,), ABSTAINED where it is not known, and its L2 radius (N,).

    CERTIFY of Cohen et al. 2019, section 3.2.2: the class comes from `first` draws, its share from `samples` others.
    Each example's answer is wrong with probability alpha at most.
    """
    with torch.no_grad():
        stream = Stream(x, generator)
        guess = sample_under_noise(model, x, stream, sigma, first).argmax(1)
        counts = sample_under_noise(model, x, stream, sigma, samples)
        successes = counts.gather(1, guess[:, None]).squeeze(1)
    bound = lower_confidence_bound(successes.cpu().numpy(), samples, alpha)
    radius = torch.from_numpy(certified_radius(sigma, bound)).to(torch.float32).to(x.device)
    return torch.where(torch.from_numpy(bound > 0.5).to(x.device), guess, ABSTAINED), radius


def needed_radius(x: Tensor, threat: Threat) -> Tensor:
    """Return the L2 radius (N,) whose ball holds the threat's: eps, for linf eps times the root of the pixels."""
    factor: dict[Norm, float] = {"l2": 1.0, "l1": 1.0, "linf": math.sqrt(x[:1].numel())}
    return threat.eps_for(x).flatten() * factor[threat.norm]


@dataclass(frozen=True)
class RandomizedSmoothing:
    """The smoothed classifier's L2 radius by Clopper-Pearson, wrong with chance alpha an example (Cohen et al. 2019).

    The smoothed classifier answers with the class that the model predicts most often under Gaussian noise of deviation
    `sigma`; `n0` draws choose the class, `n` bound its share. It is another classifier than the model.
    """

    sigma: PositiveFloat = 0.25
    n0: PositiveInt = 100
    n: PositiveInt = 1000
    alpha: OpenShare = 0.001
    smoothed: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator
    ) -> Certified:
        """Return which examples the smoothed classifier gives their label on the whole ball."""
        prediction, radius = smoothed_certificate(
            model, x, sigma=self.sigma, first=self.n0, samples=self.n, alpha=self.alpha, generator=generator
        )
        # The theorem holds for changes shorter than the radius, not for those as long.
        certified = (prediction == y) & (radius > needed_radius(x, threat))
        return Certified(certified, prediction, radius, (self.n0 + self.n) * len(x))
