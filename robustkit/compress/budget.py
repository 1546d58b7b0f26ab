"""Channel pruning to a budget of work, bytes or time instead of a share of channels: bisected, each try measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import safetensors.torch as safetensors
from torch import nn

from robustkit.compress.base import CompressContext
from robustkit.compress.channel_criteria import CHANNEL_METHODS
from robustkit.compress.costs import count_macs, measure_latency
from robustkit.compress.masks import Masks
from robustkit.compress.shrink import shrink
from robustkit.errors import ModelError
from robustkit.models.widths import widths_of
from robustkit.params import Bytes, OpenShare, Schedule

HEADER = 2048
"""Bytes for what a file says of the architecture besides its widths."""
TRIES = 9
Cost = Callable[[nn.Module], float]


def least_share(cost: Callable[[float], float], budget: float, tries: int = TRIES) -> float:
    """Return the smallest share in [0, 1], to within 2^-tries, whose cost is within the budget; costs fall with shares.

    Raises:
        ModelError: even a share of 1 costs more.
    """
    if cost(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1.0
    least = cost(high)
    if least > budget:
        raise ModelError(f"a budget of {budget:.4g} cannot be met: with one channel a layer left it takes {least:.4g}")
    for _ in range(tries):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def file_bytes(model: nn.Module) -> float:
    """Return the bytes of the model's file, within the length of its architecture's parameters."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    told = sum(len(name) + len(width.model_dump_json()) + 8 for name, width in widths_of(model).items())
    return float(len(safetensors.save(tensors)) + told + HEADER)


@dataclass(frozen=True)
class Budget:
    """Prune as many channels as a budget asks for: a share of the MACs or of the latency, or bytes; measured shrunk.

    Exactly one of `macs`, `latency` and `bytes` is given; shares are of the model that the variant starts with.
    """

    method: Literal[
        "channel_l1", "channel_l2", "channel_fpgm", "channel_bn_scale", "channel_taylor", "channel_random"
    ] = "channel_l2"
    macs: OpenShare | None = None
    latency: OpenShare | None = None
    bytes: Bytes | None = None

    @property
    def sparsity(self) -> float:
        """Unknown before it is tried; the budget decides."""
        return 0.0

    @property
    def schedule(self) -> Schedule:
        """The share of channels is found once, before the training."""
        return "one_shot"

    @property
    def begin(self) -> float:
        """Unused: the share is found once."""
        return 0.0

    @property
    def end(self) -> float:
        """Unused: the share is found once."""
        return 0.0

    @property
    def updates(self) -> int:
        """The share is found once."""
        return 1

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return the masks of the fewest channels whose removal meets the budget.

        Raises:
            ModelError: not exactly one budget is given, or it cannot be met.
        """
        cost, budget, unit = self._cost(model, context)
        # Every try draws the same images and numbers, or costs would not fall with the share.
        state = context.generator.get_state()

        def masked(share: float) -> Masks:
            context.generator.set_state(state)
            return CHANNEL_METHODS[self.method](share).masks(model, current, share, context)

        def tried(share: float) -> float:
            smaller = copy.deepcopy(model)
            masked(share).apply_(smaller)
            return cost(shrink(smaller, context.example).model)

        share = least_share(tried, budget)
        reached = f"{self.method} at {share:.1%} of the channels takes {tried(share):.4g} {unit}"
        context.note(f"budget: {reached}, {budget:.4g} is allowed")
        return masked(share)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check that the pruned model is still within bytes; shares were checked when the masks were chosen."""
        if self.bytes is not None:
            size = file_bytes(shrink(model, context.example).model)
            if size > self.bytes:
                raise ModelError(f"budget: the shrunk model has {size:,.0f} bytes, {self.bytes:,} are allowed")

    def _cost(self, model: nn.Module, context: CompressContext) -> tuple[Cost, float, str]:
        given = [value for value in (self.macs, self.latency, self.bytes) if value is not None]
        if len(given) != 1:
            raise ModelError(f"budget takes exactly one of macs, latency and bytes, not {len(given)} of them")
        channels, height, width = context.example.shape[1:]
        shape = (channels, height, width)
        if self.bytes is not None:
            return file_bytes, float(self.bytes), "bytes"
        if self.macs is not None:
            whole = count_macs(model, shape)
            return lambda small: count_macs(small, shape) / whole, self.macs, "of the MACs"
        assert self.latency is not None

        def latency(small: nn.Module) -> float:
            pair = {"small": small, "whole": copy.deepcopy(model)}
            times = measure_latency(pair, shape, context.example.device, batch_sizes=(1,))
            return times["small"]["batch_1"].median / times["whole"]["batch_1"].median

        return latency, self.latency, "of the latency"
