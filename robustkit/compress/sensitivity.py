"""How much each layer bears: clean and attacked accuracy when one layer alone is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Attack, Threat
from robustkit.compress.base import CompressContext
from robustkit.compress.channel_criteria import CHANNEL_METHODS
from robustkit.compress.channels import ChannelGroup, ChannelPruning, Score, channel_groups, dead_of, group_masks
from robustkit.compress.layer_curves import LayerCurve, Sensitivity
from robustkit.compress.masks import Masks, without_hooks, zero_masks
from robustkit.compress.prune import GlobalL1, RandomWeights, Scores, layer_masks, magnitude_scores, random_scores
from robustkit.compress.scored import Grasp, Lamp, Scored, Snip, Taylor
from robustkit.data.split import Split
from robustkit.errors import UsageError
from robustkit.evaluation.attacked import attack_outcome, clean_outcome, device_of
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.stats import clopper_pearson

WEIGHT_METHODS: dict[str, type[Scored] | type[GlobalL1] | type[RandomWeights]] = {
    "global_l1": GlobalL1,
    "random": RandomWeights,
    "lamp": Lamp,
    "taylor": Taylor,
    "snip": Snip,
    "grasp": Grasp,
}
METHODS = (*WEIGHT_METHODS, *CHANNEL_METHODS)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
Progress = Callable[[int, int], None]
"""(prunings measured, prunings to measure)"""


@dataclass(frozen=True)
class Unit:
    """What is pruned alone: a layer's weight, or the channels of a group. `masked(s)`: masks of total sparsity s."""

    name: str
    size: int
    present: float
    """The sparsity it has already."""
    masked: Callable[[float], Masks]


def layer_sensitivity(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    method: str = "global_l1",
    sparsities: Sequence[float] = SPARSITIES,
    attack: Attack | None = None,
    train: Split | None = None,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """Return clean and attacked accuracy of a model of which one layer at a time is pruned, without training.

    Images x (N, C, H, W) in [0, 1] or uint8, labels y (N,): better validation than test images, as layers are chosen by
    the answer. `method`: one of METHODS; of weights each layer is pruned by itself, of channels each group of coupled
    layers. `sparsities` are totals in (0, 1); a layer that has more zeros already stays as it is. `attack`: default PGD
    with 10 steps. `train`: training images, for the methods that look at them. The model is left alone.
    After Li et al. 2017 (arXiv 1608.08710, section 3.2), with attacked accuracy beside clean.

    Raises:
        UsageError: an unknown method, sparsities outside (0, 1), or a quantized model or ONNX file.
        ModelError: the method needs training images and there are none.
    """
    _check(method, sparsities)
    if isinstance(model, Quantized | OnnxModel):
        raise UsageError("the model is quantized or an ONNX file, and cannot be pruned: scan the one it was made of")
    plain = copy.deepcopy(without_hooks(model)).eval()
    device = device_of(plain, torch.device("cpu"))
    context = CompressContext(
        torch.zeros(2, *x.shape[1:], device=device), torch.Generator().manual_seed(seed), threat, train
    )
    units = list(_units(plain, method, context))
    judge = _Judge(x, y, threat, attack or Pgd(steps=10), seed, batch_size, device)
    clean, attacked = judge(plain)
    total, done = len(units) * len(sparsities), 0
    layers = []
    for unit in units:
        found = []
        for sparsity in sparsities:
            found.append((clean, attacked) if sparsity <= unit.present else judge(_pruned(plain, unit, sparsity)))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        layers.append(
            LayerCurve(
                name=unit.name,
                size=unit.size,
                clean=[one / len(y) for one, _ in found],
                attacked=[other / len(y) for _, other in found],
            )
        )
    return Sensitivity(
        method=method,
        threat={"norm": threat.norm, "eps": float(threat.eps)},
        sparsities=list(sparsities),
        clean=clopper_pearson(clean, len(y)),
        attacked=clopper_pearson(attacked, len(y)),
        layers=layers,
    )


def _check(method: str, sparsities: Sequence[float]) -> None:
    if method not in METHODS:
        raise UsageError(f"{method!r} cannot be scanned layer by layer; one of {', '.join(METHODS)} can")
    if not sparsities or not all(0 < one < 1 for one in sparsities):
        raise UsageError(f"sparsities are shares between 0 and 1, e.g. 50%,80%,90%, not {list(sparsities)}")


@dataclass(frozen=True)
class _Judge:
    """Counts the images that a model gets right without and under the attack."""

    x: Tensor
    y: Tensor
    threat: Threat
    attack: Attack
    seed: int
    batch_size: int
    device: torch.device

    def __call__(self, model: nn.Module) -> tuple[int, int]:
        clean = clean_outcome(model, self.x, self.y, batch_size=self.batch_size, device=self.device)
        attacked = attack_outcome(
            model,
            self.x,
            self.y,
            self.attack,
            self.threat,
            clean=clean,
            seed=self.seed,
            label="sensitivity",
            batch_size=self.batch_size,
            device=self.device,
        )
        return int(clean.correct.sum()), int(attacked.correct.sum())


def _pruned(model: nn.Module, unit: Unit, sparsity: float) -> nn.Module:
    pruned = copy.deepcopy(model)
    unit.masked(sparsity).apply_(pruned)
    return pruned


def _units(model: nn.Module, method: str, context: CompressContext) -> Iterator[Unit]:
    if method in CHANNEL_METHODS:
        yield from _channel_units(model, CHANNEL_METHODS[method](0.0), context)
        return
    present = zero_masks(model)
    for name, score in _scores(model, WEIGHT_METHODS[method], context).items():
        zeros = float((present.of(name, score) == 0).float().mean())

        def masked(share: float, one: Scores = {name: score}) -> Masks:  # noqa: B006
            return layer_masks(one, present, share)

        yield Unit(name, score.numel(), zeros, masked)


def _scores(
    model: nn.Module, kind: type[Scored] | type[GlobalL1] | type[RandomWeights], context: CompressContext
) -> Scores:
    if issubclass(kind, Scored):
        return kind(0.0).scores(model, zero_masks(model), context)
    return random_scores(model, context.generator) if kind is RandomWeights else magnitude_scores(model)


def _channel_units(model: nn.Module, method: ChannelPruning, context: CompressContext) -> Iterator[Unit]:
    prepared = method.prepare(model, context)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for group in sorted(channel_groups(model, context.example), key=lambda one: order[one.name]):
        dead = dead_of(group)

        def scored(one: ChannelGroup, held: Masks, dead: Tensor = dead) -> Tensor:
            score = method.score(one, held, prepared)
            # A live channel may score 0 as well; what is dead goes first.
            return score.clamp_min(torch.finfo(score.dtype).tiny) * ~dead

        def masked(share: float, group: ChannelGroup = group, score: Score = scored) -> Masks:
            return group_masks([group], Masks(), share, score)

        yield Unit(group.name, group.width, int(dead.sum()) / group.width, masked)
