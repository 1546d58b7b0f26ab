"""What a pruning method is, and the schedule by which it reaches its sparsity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.compress.masks import Masks
from robustkit.data.split import Split
from robustkit.errors import ModelError
from robustkit.params import Schedule
from robustkit.train.hooks import Defense


def _unheard(message: str) -> None:
    """Take a note that nobody asked for."""


@dataclass(frozen=True)
class CompressContext:
    """What a pruning method may use. `example` is (2, C, H, W) of zeros on the model's device."""

    example: Tensor
    generator: torch.Generator
    threat: Threat
    train: Split | None = None
    """Training images, without those of the validation split; the test split is nobody's to prune by."""
    note: Callable[[str], None] = _unheard
    """note(message): goes into the report of the variant."""
    early: Callable[[int], Mapping[str, Tensor]] | None = None
    """early(epoch): the weights after an epoch of the first training in the line; 0 is before it."""
    defenses: Sequence[tuple[str, Defense]] = ()
    """The variant's defenses with their labels, for methods that learn with its loss."""

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Return random training images (N, C, H, W) in [0, 1] and labels (N,) on the model's device, N <= count.

        Raises:
            ModelError: there are no training images.
        """
        if self.train is None or not len(self.train):
            raise ModelError("this method needs training images; pass `train` to MaskKeeper")
        chosen = torch.randperm(len(self.train), generator=self.generator)[:count]
        drawn = self.train.select(chosen)
        device = self.example.device
        return drawn.floats(0, len(drawn)).to(device), drawn.labels.to(device)


@runtime_checkable
class Compressor(Protocol):
    """A pruning method: its parameters at construction, masks at call. `sparsity` is the total, in [0, 1]."""

    @property
    def sparsity(self) -> float: ...  # noqa: D102

    @property
    def schedule(self) -> Schedule: ...  # noqa: D102

    @property
    def begin(self) -> float: ...  # noqa: D102

    @property
    def end(self) -> float: ...  # noqa: D102

    @property
    def updates(self) -> int: ...  # noqa: D102

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this total sparsity that keep nothing that `current` drops."""
        ...

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Raise a ModelError unless the model has the sparsity asked for, within one weight or channel."""
        ...


@runtime_checkable
class Counting(Protocol):
    """What a pruning method adds whose sparsity is not the share of zeros among single weights."""

    def reached(self, model: nn.Module, context: CompressContext) -> float:
        """Return the sparsity that the model has, in [0, 1], as the method counts it."""
        ...


@runtime_checkable
class Starter(Protocol):
    """What is done to the weights of a pruned model before its training, once the masks are chosen."""

    def start(self, model: nn.Module, context: CompressContext) -> None:
        """Change the weights in place; the masks are applied again afterwards."""
        ...


@runtime_checkable
class Finisher(Protocol):
    """What is done to a pruned model after its training; in the order of the recipe."""

    def finish(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the finished model; what is worth telling goes to `context.note`."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """What makes a quantized model of a finished one: after everything else, wherever it stands in the recipe."""

    def quantize(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Return the quantized model; what is worth telling goes to `context.note`."""
        ...

    def training(self, context: CompressContext) -> Defense | None:
        """Return what the variant is trained with so that it can be quantized; None for nothing."""
        ...


def scheduled_sparsity(schedule: Schedule, start: float, final: float, share: float) -> float:
    """Return the sparsity after `share` in [0, 1] of a schedule's updates."""
    if schedule == "iterative":
        return start + (final - start) * min(1.0, max(0.0, share))
    return cubic_sparsity(start, final, share) if schedule == "cubic" else final


def cubic_sparsity(start: float, final: float, share: float) -> float:
    """Return the sparsity after `share` in [0, 1] of the schedule (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1)."""
    left = (1.0 - min(1.0, max(0.0, share))) ** 3
    return final + (start - final) * left
