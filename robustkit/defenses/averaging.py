"""Averages of weights: EMA and SWA. The average is what is evaluated and stored; training goes on with its own."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.defenses.constraints import settle_spectral_norm_, spectral_vectors
from robustkit.models.statistics import measure_statistics_
from robustkit.params import NonNegativeInt, OpenShare, PositiveInt
from robustkit.train.hooks import Batch, Defense, Forward, Step

Named = dict[str, Tensor]


def averaged(model: nn.Module) -> Named:
    """Return what can be averaged, by name and not copied: parameters and floating-point buffers.

    The singular vectors of spectral norms are not: the mean of two is the singular vector of nothing.
    """
    found: Named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    left = spectral_vectors(model)
    return found | {
        name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point() and name not in left
    }


@torch.no_grad()
def move_(average: Named, values: Named, share: float) -> None:
    """Move the average towards the values by a share in [0, 1], in place; what is pruned stays exactly zero.

    A weight of a convolution or linear layer that is exactly zero now was pruned, so its average is set to zero too:
    an average that remembers it would not be sparse.
    """
    for name, value in values.items():
        if average[name].device != value.device:
            average[name] = average[name].to(value.device)
        average[name].lerp_(value, share)
        if value.dim() > 1:
            average[name].mul_(value != 0)


def warmed_decay(decay: float, updates: int) -> float:
    """Return the decay of the EMA at its n-th update, from 0: min(decay, (1 + n) / (10 + n)).

    Without it a short training would end with an average that is mostly its random first weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the model that holds these parameters and buffers."""
    filled = copy.deepcopy(model)
    with torch.no_grad():
        for name, place in averaged(filled).items():
            if name in values:
                place.copy_(values[name])
    settle_spectral_norm_(filled)
    return filled


def recalibrate_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of every batch norm to the mean over batches of images, in place.

    Modules keep their mode; a batch norm in eval mode in a model in training is frozen, and keeps its statistics. So do
    all of them where there is no batch. Averaged weights have other activations than any of the weights had, so that
    none of their statistics fit (Izmailov et al. 2018, section 3.2).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats and norm.training >= model.training]
    if norms and batches:
        measure_statistics_(model, norms, batches)


def seen(batch: Batch) -> Tensor:
    """Return the images (N, C, H, W) that a step trains on: the adversarial ones where there are any."""
    return (batch.x if batch.x_adv is None else batch.x_adv).detach()


class Ema(Defense):
    """Evaluate and store an exponential moving average of the weights (Polyak & Juditsky 1992).

    decay: what is kept of the average at each step, less at first (see warmed_decay). The batch norm's statistics are
    taken anew, for the averaged weights, on the last `batches` training batches of the epoch, as the network saw them,
    adversarial ones included; with none they are averaged like the weights.
    """

    def __init__(self, decay: OpenShare = 0.999, batches: NonNegativeInt = 20) -> None:
        self.decay = decay
        self.batches = batches
        self._average: Named = {}
        self._updates = 0
        self._epoch = 0
        self._seen: deque[Tensor] = deque(maxlen=batches)

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Forget the images of the epoch before: a training that was stopped goes on without them."""
        if step.epoch != self._epoch:
            self._epoch = step.epoch
            self._seen.clear()
        return batch

    def around_step(self, batch: Batch, forward: Forward, step: Step) -> AbstractContextManager[None]:
        """Keep the images, for the batch norm's statistics."""
        self._seen.append(seen(batch))
        return nullcontext()

    def after_step(self, step: Step) -> None:
        """Move the average towards the weights."""
        values = averaged(step.model)
        if not self._average:
            self._average = {name: value.clone() for name, value in values.items()}
        move_(self._average, values, 1 - warmed_decay(self.decay, self._updates))
        self._updates += 1

    def evaluated_model(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the averaged weights; the model itself before the first step."""
        if not self._average:
            return model
        mean = with_values(model, self._average)
        recalibrate_(mean, self._seen)
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the average and how many steps are in it."""
        return {"average": dict(self._average), "updates": self._updates, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""
        self._average, self._updates = dict(state["average"]), int(state["updates"])
        self._epoch = int(state["epoch"])
        self._seen.clear()


class Swa(Defense):
    """Evaluate and store the mean of the weights at the ends of epochs: SWA (Izmailov et al. 2018).

    start: share of training after which epochs count; no earlier checkpoint is selected. The batch norm's statistics
    are taken anew, for the averaged weights, on the last `batches` training batches of the epoch: as the network saw
    them, adversarial ones included. A schedule that does not fall to zero gives the mean more to average.
    """

    def __init__(self, start: OpenShare = 0.75, batches: PositiveInt = 20) -> None:
        self.start = start
        self.batches = batches
        self._average: Named = {}
        self._count = 0
        self._epoch = 0
        self._seen: deque[Tensor] = deque(maxlen=batches)

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Take the weights that the last epoch ended with, at the first step of the next."""
        if step.epoch != self._epoch:
            if step.epoch / step.epochs > self.start:
                self._average, self._count = self._with(step.model), self._count + 1
            self._epoch = step.epoch
            self._seen.clear()
        return batch

    def around_step(self, batch: Batch, forward: Forward, step: Step) -> AbstractContextManager[None]:
        """Keep the images, for the batch norm's statistics."""
        if (step.epoch + 1) / step.epochs > self.start:
            self._seen.append(seen(batch))
        return nullcontext()

    def ready(self, step: Step) -> bool:
        """Say that no checkpoint from before the mean begins may be selected."""
        return step.progress > self.start

    def evaluated_model(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the mean of the weights, this epoch's included, and statistics to match."""
        if not self._seen:
            return model
        mean = with_values(model, self._with(model))
        if self._count:
            recalibrate_(mean, self._seen)
        return mean

    def _with(self, model: nn.Module) -> Named:
        values = averaged(model)
        mean = {name: value.clone() for name, value in (self._average or values).items()}
        move_(mean, values, 1 / (self._count + 1))
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the mean of the whole epochs before this one, and how many they are."""
        return {"average": dict(self._average), "count": self._count, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""
        self._average, self._count, self._epoch = dict(state["average"]), int(state["count"]), int(state["epoch"])
        self._seen.clear()
