"""Unstructured pruning by torch.nn.utils.prune methods: global, by layer, random, or a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from robustkit.compress.base import CompressContext
from robustkit.compress.masks import Masks, prunable
from robustkit.errors import ModelError
from robustkit.params import Fraction, PositiveInt, Schedule

Scores = dict[str, Tensor]


def magnitude_scores(model: nn.Module) -> Scores:
    """Return |w| of every prunable weight."""
    return {name: weight.detach().abs() for name, weight in prunable(model)}


def random_scores(model: nn.Module, generator: torch.Generator) -> Scores:
    """Return a random score in [0, 1) of every prunable weight."""
    return {name: _uniform(weight, generator) for name, weight in prunable(model)}


def global_masks(scores: Scores, current: Masks, sparsity: float, cap: float = 1.0) -> Masks:
    """Return masks that drop exactly round(sparsity * n) weights, those of the lowest scores over all layers.

    What `current` drops is dropped first and counts. `cap`: no layer loses more than this share; others give instead.

    Raises:
        ModelError: more is dropped already, or the cap leaves too little to drop.
    """
    flat = torch.cat([_live(name, score, current, cap).flatten() for name, score in scores.items()])
    count = round(sparsity * flat.numel())
    _check_room(flat, count, cap)
    chosen = _lowest(flat, count)
    pieces = chosen.split([score.numel() for score in scores.values()])
    found = {name: piece.view_as(scores[name]) for name, piece in zip(scores, pieces, strict=True)}
    return current.narrowed(found)


def layer_masks(scores: Scores, current: Masks, sparsity: float) -> Masks:
    """Return masks that drop the same share in every layer, round(sparsity * n) weights in all."""
    return counted_masks(scores, current, equal_counts(scores, sparsity))


def equal_counts(scores: Scores, sparsity: float) -> dict[str, int]:
    """Return how many weights each layer loses of the same share in all, round(sparsity * n) together."""
    counts = largest_remainder([sparsity * score.numel() for score in scores.values()])
    return dict(zip(scores, counts, strict=True))


def counted_masks(scores: Scores, current: Masks, counts: Mapping[str, int]) -> Masks:
    """Return masks that drop so many weights of each layer, those of the lowest scores.

    Raises:
        ModelError: a layer has more zeros already.
    """
    found = {}
    for name, score in scores.items():
        live = _live(name, score, current, 1.0)
        _check_room(live.flatten(), counts[name], 1.0, name)
        found[name] = _lowest(live.flatten(), counts[name]).view_as(score)
    return current.narrowed(found)


def largest_remainder(exact: list[float]) -> list[int]:
    """Return whole numbers close to the exact ones that add up to their rounded sum."""
    counts = [int(value) for value in exact]
    missing = round(sum(exact)) - sum(counts)
    by_rest = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[:missing]:
        counts[place] += 1
    return counts


def _live(name: str, score: Tensor, current: Masks, cap: float) -> Tensor:
    """Return positive scores of live weights, 0 for dropped ones, infinity for those that the cap protects."""
    mask = current.of(name, score)
    # The smallest positive number keeps a live weight of exactly zero apart from a dropped one.
    live = score.clamp_min(torch.finfo(score.dtype).tiny) * mask
    protected = score.numel() - int(cap * score.numel())
    if protected > 0:
        top = live.flatten().topk(protected).indices
        live = live.flatten().index_fill(0, top, torch.inf).view_as(score)
    return live


def _check_room(live: Tensor, count: int, cap: float, name: str = "") -> None:
    dropped, free = int((live == 0).sum()), int((live != torch.inf).sum())
    where = f" in {name}" if name else ""
    if dropped > count:
        raise ModelError(
            f"{dropped} of {live.numel()} weights{where} are zero already; sparsity is the total, and "
            f"{count / max(1, live.numel()):.1%} is less than that"
        )
    if count > free:
        raise ModelError(over_cap(count / live.numel(), cap))


def over_cap(sparsity: float, cap: float) -> str:
    """Return what is wrong with a sparsity that a layer may not lose, and what to do."""
    return (
        f"a sparsity of {sparsity:.1%} would drop more than max_layer_sparsity={cap:g} of a layer; "
        "raise max_layer_sparsity (1 may empty a layer) or lower sparsity"
    )


def _lowest(scores: Tensor, count: int) -> Tensor:
    method = prune.L1Unstructured(amount=count)
    mask: Tensor = method.compute_mask(scores, torch.ones_like(scores))
    return mask


def check_sparsity(model: nn.Module, sparsity: float, name: str) -> None:
    """Raise a ModelError unless round(sparsity * n) of the n prunable weights are zero, within one."""
    zeros = sum(int((weight == 0).sum()) for _, weight in prunable(model))
    total = sum(weight.numel() for _, weight in prunable(model))
    wanted = round(sparsity * total)
    if abs(zeros - wanted) > 1:
        more = "; what the variant's other methods or its parent prune counts as well" if zeros > wanted else ""
        raise ModelError(f"{name}: {zeros} of {total} weights are zero, {wanted} were asked for{more}")


@dataclass(frozen=True)
class GlobalL1:
    """Prune the smallest weights over all layers (Han et al. 2015; torch.nn.utils.prune.global_unstructured)."""

    sparsity: Fraction
    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 20
    max_layer_sparsity: Fraction = 0.99

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this total sparsity by magnitude."""
        return global_masks(magnitude_scores(model), current, sparsity, self.max_layer_sparsity)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check the sparsity reached."""
        check_sparsity(model, self.sparsity, "global_l1")


@dataclass(frozen=True)
class LayerL1:
    """Prune the smallest weights of each layer, the same share in all (torch.nn.utils.prune.l1_unstructured)."""

    sparsity: Fraction
    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 20
    max_layer_sparsity: Fraction = 0.99

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this sparsity in every layer by magnitude.

        Raises:
            ModelError: that is more than max_layer_sparsity, or less than what is dropped already.
        """
        if sparsity > self.max_layer_sparsity:
            raise ModelError(over_cap(sparsity, self.max_layer_sparsity))
        return layer_masks(magnitude_scores(model), current, sparsity)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check the sparsity reached."""
        check_sparsity(model, self.sparsity, "layer_l1")


@dataclass(frozen=True)
class RandomWeights:
    """Prune random weights: the control that every criterion must beat."""

    sparsity: Fraction
    schedule: Schedule = "one_shot"
    begin: Fraction = 0.0
    end: Fraction = 0.5
    updates: PositiveInt = 20
    max_layer_sparsity: Fraction = 0.99

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks of this total sparsity by chance."""
        return global_masks(random_scores(model, context.generator), current, sparsity, self.max_layer_sparsity)

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check the sparsity reached."""
        check_sparsity(model, self.sparsity, "random")


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn where the generator lives, so that CPU and GPU drop the same weights.
    draw = torch.rand(like.shape, generator=generator, device=generator.device)
    return draw.to(like.device, like.dtype)
