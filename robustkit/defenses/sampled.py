"""Inference wrappers that average a model's answers over random draws: noise on the image, or dropout left on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.defenses.dropout import attach_dropout
from robustkit.errors import UsageError
from robustkit.params import NonNegativeFloat, OpenShare, PositiveInt
from robustkit.seeding import derive_seed
from robustkit.train.hooks import Defense


def mean_answer(logits: list[Tensor]) -> Tensor:
    """Return the logarithm of the mean softmax of logits, each (N, classes): logits of the averaged classifier."""
    return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0) - torch.tensor(float(len(logits))).log()


def gaussian(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Return standard normal noise of a shape, of its own seed, on the device and in the type of `like`."""
    if like.is_meta:
        return torch.zeros(shape, device="meta", dtype=like.dtype)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def kept(shape: tuple[int, ...], p: float, seed: int, like: Tensor) -> Tensor:
    """Return a dropout mask of a shape: 0 with chance p, else 1 / (1 - p); of its own seed."""
    if like.is_meta:
        return torch.ones(shape, device="meta", dtype=like.dtype)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return (torch.rand(shape, generator=generator, device=like.device) >= p).to(like.dtype) / (1 - p)


class Sampled(nn.Module):
    """The mean answer of a model over `samples` draws; equal for every image, so that batches change no answer.

    The draws are the same in each call; with `fresh` each call has draws of its own, as an attacker's must.
    """

    def __init__(self, model: nn.Module, samples: int, *, fresh: bool = False) -> None:
        super().__init__()
        self.model, self.samples, self.fresh = model, samples, fresh
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images x."""
        self.calls += int(self.fresh)
        return mean_answer([self.sample(x, derive_seed(self.calls, number)) for number in range(self.samples)])

    def sample(self, x: Tensor, seed: int) -> Tensor:
        """Return the logits of one draw."""
        raise NotImplementedError


class Smoothed(Sampled):
    """A model asked about noisy copies of the images."""

    def __init__(self, model: nn.Module, samples: int, sigma: float, *, fresh: bool = False) -> None:
        super().__init__(model, samples, fresh=fresh)
        self.sigma = sigma

    def sample(self, x: Tensor, seed: int) -> Tensor:
        """Return the logits of the images with one draw of noise."""
        logits: Tensor = self.model(x + self.sigma * gaussian(tuple(x.shape[1:]), seed, x))
        return logits


class SampledDropout(nn.Module):
    """Dropout that drops also in eval mode: the units that its seed says, the same for every example."""

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number, self.seed = p, number, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, ...) with units dropped and the others scaled."""
        return x * kept(tuple(x.shape[1:]), self.p, derive_seed(self.seed, self.number), x)


class MonteCarlo(Sampled):
    """A model with SampledDropout in it, asked with one mask after the other."""

    def sample(self, x: Tensor, seed: int) -> Tensor:
        """Return the logits of one thinned network."""
        for module in self.model.modules():
            if isinstance(module, SampledDropout):
                module.seed = seed
        logits: Tensor = self.model(x)
        return logits


@dataclass(frozen=True)
class RandomizedSmoothing(Defense):
    """Answer with the mean softmax over noisy copies of the image (Cohen et al. 2019; Lecuyer et al. 2019).

    sigma: standard deviation of the noise in [0, 1] pixel units. Evaluation has the same noise in each call; the
    adaptive attack averages gradients over noise of its own (EOT). Costs `samples` passes an image.
    """

    sigma: NonNegativeFloat = 0.1
    samples: PositiveInt = 16

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the smoothed model."""
        return Smoothed(model, self.samples, self.sigma)

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the smoothed model with new noise in each call."""
        if not isinstance(wrapped, Smoothed):
            raise UsageError(f"attack_view takes what wrap returned, not a {type(wrapped).__name__}")
        return Smoothed(wrapped.model, self.samples, self.sigma, fresh=True)


@dataclass(frozen=True)
class McDropout(Defense):
    """Leave dropout on when the model is asked, and answer with the mean softmax (Gal and Ghahramani 2016).

    p: chance that a hidden input of a linear layer is dropped. Evaluation has the same masks in each call; the adaptive
    attack averages gradients over masks of its own (EOT). Costs `samples` passes an image.
    """

    p: OpenShare = 0.3
    samples: PositiveInt = 16

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with dropout in it; UsageError where it has no hidden linear layer."""
        # A copy: the dropout must not show in the plain model.
        return MonteCarlo(attach_dropout(copy.deepcopy(model), self._layer), self.samples)

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the same model with new masks in each call."""
        if not isinstance(wrapped, MonteCarlo):
            raise UsageError(f"attack_view takes what wrap returned, not a {type(wrapped).__name__}")
        return MonteCarlo(wrapped.model, self.samples, fresh=True)

    def _layer(self, number: int) -> nn.Module:
        return SampledDropout(self.p, number)
