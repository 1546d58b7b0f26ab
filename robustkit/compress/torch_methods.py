"""Pruning methods written for torch.nn.utils.prune: torch's own, and any user's `BasePruningMethod`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from robustkit.compress.base import CompressContext
from robustkit.compress.masks import Masks, prunable
from robustkit.errors import ModelError, UsageError
from robustkit.params import Fraction, PositiveInt, Schedule


@dataclass(frozen=True)
class Timing:
    """When a method prunes: what a recipe may write beside the parameters of the method itself."""

    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 20


@dataclass(frozen=True)
class TorchMethod:
    """A torch.nn.utils.prune method, applied to each layer; what it drops is its own affair.

    one_shot: its `compute_mask` decides once, on the whole layer. cubic and iterative: it is asked again at each update
    of the schedule, for what is left, as torch's `PruningContainer` asks a second method; its `amount`, a share in
    [0, 1], is what is reached at the end.

    Raises:
        UsageError: a schedule for a method without an `amount` in [0, 1].
    """

    method: prune.BasePruningMethod
    schedule: Schedule = "one_shot"
    begin: float = 0.0
    end: float = 0.5
    updates: int = 20

    def __post_init__(self) -> None:
        if self.schedule != "one_shot" and amount_of(self.method) is None:
            raise UsageError(
                f"{type(self.method).__name__}: a schedule needs an `amount` that is a share in [0, 1]; "
                "leave schedule out to prune at once"
            )

    @property
    def sparsity(self) -> float:
        """The share that the method drops of each layer at the end; 0 where it does not say."""
        return amount_of(self.method) or 0.0

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return what the method's compute_mask returns for every prunable weight."""
        found: dict[str, Tensor] = {}
        devices = {weight.device for _, weight in prunable(model) if weight.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            # Random methods of torch's draw from the global generators.
            torch.manual_seed(context.generator.initial_seed())
            for name, weight in prunable(model):
                kept = current.of(name, weight.detach())
                found[name] = (
                    self.method.compute_mask(weight.detach(), kept)
                    if self.schedule == "one_shot"
                    else further(self.method, weight.detach(), kept, sparsity)
                )
        return current.narrowed(found)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Accept whatever the method reached, but no layer that it emptied."""
        for name, weight in prunable(model):
            if not bool((weight != 0).any()):
                raise ModelError(f"{type(self.method).__name__} emptied the layer of {name}")


def amount_of(method: prune.BasePruningMethod) -> float | None:
    """Return the share in [0, 1] that a method was made to drop; None where it counts weights or has no `amount`."""
    amount = getattr(method, "amount", None)
    return amount if isinstance(amount, float) and 0 <= amount <= 1 else None


def further(method: prune.BasePruningMethod, weight: Tensor, kept: Tensor, share: float) -> Tensor:
    """Return the mask of a layer after the method was asked for so much more that `share` of it is dropped in all.

    weight, kept: the layer and its mask of 0 and 1, of one shape. The method sees what is left alone.
    """
    structured = getattr(method, "PRUNING_TYPE", "unstructured") == "structured"
    live = kept.transpose(0, getattr(method, "dim", 0)).flatten(1).any(1) if structured else kept
    gone = 1.0 - float(live.float().mean())
    if share <= gone:
        return kept
    asked = copy.copy(method)
    asked.amount = (share - gone) / (1.0 - gone)  # type: ignore[attr-defined]
    container = prune.PruningContainer()
    container._tensor_name = asked._tensor_name = "weight"
    container.add_pruning_method(asked)
    mask: Tensor = container.compute_mask(weight, kept)
    return mask


def make_method(method: type[prune.BasePruningMethod], values: Mapping[str, Any]) -> TorchMethod:
    """Return a method with the parameters of a recipe: its own, and those of `Timing`."""
    timing = {name: value for name, value in values.items() if name in Timing.__dataclass_fields__}
    return TorchMethod(method(**{name: value for name, value in values.items() if name not in timing}), **timing)
