"""Pruning of single weights by importance scores, the lowest over all layers first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustkit.compress.base import CompressContext
from robustkit.compress.criteria import (
    Batches,
    grasp_scores,
    lamp_scores,
    ranks,
    snip_scores,
    synflow_scores,
    taylor_scores,
)
from robustkit.compress.masks import Masks, sparsity_of
from robustkit.compress.prune import Scores, check_sparsity, global_masks
from robustkit.params import Fraction, PositiveFloat, PositiveInt, Schedule


@dataclass(frozen=True)
class Scored:
    """Base of the methods that only differ in their scores."""

    sparsity: Fraction
    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 20
    max_layer_sparsity: Fraction = 0.99

    def scores(self, model: nn.Module, current: Masks, context: CompressContext) -> Scores:
        """Return the importance of every prunable weight; `current` has been applied to the model."""
        raise NotImplementedError

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this total sparsity that drop the weights of the lowest scores."""
        return global_masks(self.scores(model, current, context), current, sparsity, self.max_layer_sparsity)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check the sparsity reached."""
        check_sparsity(model, self.sparsity, type(self).__name__.lower())


def batches_of(context: CompressContext, examples: int, batch_size: int) -> Batches:
    """Return random training images in batches, no more than `examples` in all; no lone image after the others.

    Batch norm takes the statistics of each batch, and those of one image may not exist.
    """
    x, y = context.batch(examples)
    found = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return found[:-1] if batch_size > 1 and len(found) > 1 and len(found[-1][0]) == 1 else found


@dataclass(frozen=True)
class Lamp(Scored):
    """Prune by magnitude relative to the weights of the layer that stay longer (Lee et al. 2021)."""

    def scores(self, model: nn.Module, current: Masks, context: CompressContext) -> Scores:
        """Return the LAMP scores."""
        return lamp_scores(model)


@dataclass(frozen=True)
class Snip(Scored):
    """Prune the weights whose connection matters least to the loss, also before training (Lee et al. 2019)."""

    examples: PositiveInt = 256
    batch_size: PositiveInt = 128

    def scores(self, model: nn.Module, current: Masks, context: CompressContext) -> Scores:
        """Return |w dL/dw| on training images."""
        return snip_scores(model, batches_of(context, self.examples, self.batch_size))


@dataclass(frozen=True)
class Taylor(Scored):
    """Prune the weights whose loss changes least without them, to first order (Molchanov et al. 2019)."""

    examples: PositiveInt = 512
    batch_size: PositiveInt = 64

    def scores(self, model: nn.Module, current: Masks, context: CompressContext) -> Scores:
        """Return the mean of (w dL/dw)^2 over batches of training images."""
        return taylor_scores(model, batches_of(context, self.examples, self.batch_size))


@dataclass(frozen=True)
class Grasp(Scored):
    """Prune the weights that carry least of the gradient's flow; meant before training (Wang et al. 2020)."""

    examples: PositiveInt = 256
    batch_size: PositiveInt = 128
    temperature: PositiveFloat = 200.0

    def scores(self, model: nn.Module, current: Masks, context: CompressContext) -> Scores:
        """Return the ranks of w (H g) on training images."""
        return ranks(grasp_scores(model, batches_of(context, self.examples, self.batch_size), self.temperature))


@dataclass(frozen=True)
class Synflow(Scored):
    """Prune what carries least of the flow through the net, in rounds and without data (Tanaka et al. 2020)."""

    rounds: PositiveInt = 100

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this total sparsity; each round keeps the same share of what is left."""
        start = sparsity_of(model)
        if sparsity <= start:
            return global_masks(synflow_scores(model, current, context.example), current, sparsity)
        for number in range(1, self.rounds + 1):
            share = number / self.rounds
            reached = sparsity if number == self.rounds else 1 - (1 - start) ** (1 - share) * (1 - sparsity) ** share
            scores = synflow_scores(model, current, context.example)
            current = global_masks(scores, current, reached, self.max_layer_sparsity)
        return current
