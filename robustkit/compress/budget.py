"""Pruning to a budget of work, bytes or time instead of a sparsity: bisected, each try measured, also as shipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch as safetensors
from torch import nn

from robustkit.compress.base import CompressContext
from robustkit.compress.channel_criteria import CHANNEL_METHODS
from robustkit.compress.costs import count_macs, gzip_size, measure_latency
from robustkit.compress.masks import Masks, sparsity_of
from robustkit.compress.prune import GlobalL1, LayerL1, RandomWeights
from robustkit.compress.scored import Lamp
from robustkit.compress.shrink import shrink
from robustkit.errors import ModelError
from robustkit.models.widths import widths_of
from robustkit.params import Bytes, OpenShare, Schedule
from robustkit.results import Flag

WEIGHT_METHODS: dict[str, type[GlobalL1] | type[LayerL1] | type[RandomWeights] | type[Lamp]] = {
    "global_l1": GlobalL1,
    "layer_l1": LayerL1,
    "lamp": Lamp,
    "random": RandomWeights,
}
MOST_WEIGHTS = 0.99
"""The largest sparsity that a budget of single weights is tried with."""
MOST_OF_A_LAYER = 0.999
HEADROOM = 0.99
"""Of gzipped bytes: trained weights may compress worse than those that the budget was met with."""
HEADER = 2048
"""Bytes for what a file says of the architecture besides its widths."""
GZIPPED_HEADER = 700
"""The same after gzip."""
TRIES = 9
Cost = Callable[[nn.Module], float]


def least_share(cost: Callable[[float], float], budget: float, tries: int = TRIES, most: float = 1.0) -> float:
    """Return the smallest share in [0, most], to within most 2^-tries, whose cost is within the budget.

    Costs fall with shares.

    Raises:
        ModelError: even `most` costs more.
    """
    if cost(0.0) <= budget:
        return 0.0
    low, high = 0.0, most
    least = cost(high)
    if least > budget:
        raise ModelError(f"a budget of {budget:.4g} cannot be met: with all pruned that may be it takes {least:.4g}")
    for _ in range(tries):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def file_gzip(model: nn.Module) -> float:
    """Return the bytes of the model's file after gzip, within the length of its architecture's parameters."""
    return float(gzip_size(_saved(model)) + GZIPPED_HEADER)


def _saved(model: nn.Module) -> bytes:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return safetensors.save(tensors)


def file_bytes(model: nn.Module) -> float:
    """Return the bytes of the model's file, within the length of its architecture's parameters."""
    told = sum(len(name) + len(width.model_dump_json()) + 8 for name, width in widths_of(model).items())
    return float(len(_saved(model)) + told + HEADER)


@dataclass(frozen=True)
class Budget:
    """Prune as little as a budget asks for: a share of MACs or latency, bytes, or bytes after gzip; measured shrunk.

    Exactly one of `macs`, `latency`, `bytes` and `gzip_bytes` is given; shares are of the model that the variant starts
    with. Methods that prune single weights can only meet `gzip_bytes`: their zeros are stored and multiplied.
    """

    method: Literal[
        "channel_l1",
        "channel_l2",
        "channel_fpgm",
        "channel_bn_scale",
        "channel_taylor",
        "channel_random",
        "global_l1",
        "layer_l1",
        "lamp",
        "random",
    ] = "channel_l2"
    macs: OpenShare | None = None
    latency: OpenShare | None = None
    bytes: Bytes | None = None
    gzip_bytes: Bytes | None = None

    @property
    def sparsity(self) -> float:
        """Unknown before it is tried; the budget decides."""
        return 0.0

    @property
    def schedule(self) -> Schedule:
        """The share is found once, before the training."""
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
        """Return the masks of the fewest channels, or weights, whose removal meets the budget.

        Raises:
            ModelError: not exactly one budget is given, the method cannot meet it, or nothing can.
        """
        cost, budget, unit = self._cost(model, context)
        # Every try draws the same images and numbers, or costs would not fall with the share.
        state = context.generator.get_state()

        def masked(share: float) -> Masks:
            context.generator.set_state(state)
            return self._masks(model, current, share, context)

        def tried(share: float) -> float:
            smaller = copy.deepcopy(model)
            masked(share).apply_(smaller)
            return cost(smaller if self._single else shrink(smaller, context.example).model)

        aim = HEADROOM * budget if self.gzip_bytes is not None else budget
        share = least_share(tried, aim, most=MOST_WEIGHTS if self._single else 1.0)
        what = "weights" if self._single else "channels"
        reached = f"{self.method} at {share:.1%} of the {what} takes {tried(share):.4g} {unit}"
        context.note(f"budget: {reached}, {budget:.4g} is allowed")
        return masked(share)

    @property
    def _single(self) -> bool:
        return self.method in WEIGHT_METHODS

    def _masks(self, model: nn.Module, current: Masks, share: float, context: CompressContext) -> Masks:
        # What is zero already counts: less than that cannot be asked for.
        if not self._single:
            return CHANNEL_METHODS[self.method](1.0).masks(model, current, share, context)
        if share <= sparsity_of(model):
            return current
        chosen = WEIGHT_METHODS[self.method](share, max_layer_sparsity=MOST_OF_A_LAYER)
        return chosen.masks(model, current, share, context)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Nothing to check of the masks: what they bring is measured when they are chosen, and on what is shipped."""

    def shipped(self, whole: nn.Module, model: nn.Module, artefact: Path, context: CompressContext) -> Flag | None:
        """Measure the budget on the artefact, or where nothing has removed the channels yet, on what will be left.

        Raises:
            ModelError: it has more MACs or bytes than are allowed.
        """
        pending = not self._single and _size(model) == _size(whole)
        if pending:
            # Masks alone save nothing; a child may still shrink.
            model = shrink(model, context.example).model
        cost, budget, unit = self._cost(whole, context)
        if pending or self.macs is not None or self.latency is not None:
            value = cost(model)
        else:
            raw = artefact.read_bytes()
            value = float(len(raw) if self.bytes is not None else gzip_size(raw))
        where = "once `shrink` has removed the channels" if pending else "as shipped"
        told = f"budget: {value:.4g} {unit} {where}, {budget:.4g} is allowed"
        context.note(told)
        if value <= budget:
            return None
        if self.latency is None:
            raise ModelError(told)
        return Flag(id="budget-missed", severity="doubt", message=f"{told}; it was met when the channels were chosen")

    def _cost(self, model: nn.Module, context: CompressContext) -> tuple[Cost, float, str]:
        given = [value for value in (self.macs, self.latency, self.bytes, self.gzip_bytes) if value is not None]
        if len(given) != 1:
            raise ModelError(
                f"budget takes exactly one of macs, latency, bytes and gzip_bytes, not {len(given)} of them"
            )
        if self._single and self.gzip_bytes is None:
            raise ModelError(
                f"budget: the zeros of {self.method} are stored and multiplied; it can meet gzip_bytes only"
            )
        channels, height, width = context.example.shape[1:]
        shape = (channels, height, width)
        if self.gzip_bytes is not None:
            return file_gzip, float(self.gzip_bytes), "bytes after gzip"
        if self.bytes is not None:
            return file_bytes, float(self.bytes), "bytes"
        if self.macs is not None:
            work = count_macs(model, shape)
            return lambda small: count_macs(small, shape) / work, self.macs, "of the MACs"
        assert self.latency is not None

        def latency(small: nn.Module) -> float:
            pair = {"small": small, "whole": copy.deepcopy(model)}
            times = measure_latency(pair, shape, context.example.device, batch_sizes=(1,))
            return times["small"]["batch_1"].median / times["whole"]["batch_1"].median

        return latency, self.latency, "of the latency"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
