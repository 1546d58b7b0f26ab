"""Pruning by scores that are learned with the variant's own loss, adversarial where its training is."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustkit.compress.base import CompressContext
from robustkit.compress.masks import PRUNABLE, Masks
from robustkit.compress.prune import (
    Scores,
    check_sparsity,
    counted_masks,
    equal_counts,
    global_masks,
    magnitude_scores,
    over_cap,
)
from robustkit.data.batches import epoch_order
from robustkit.errors import ModelError
from robustkit.params import Fraction, PositiveFloat, PositiveInt, Schedule
from robustkit.train.hooks import Batch, Defense, Forward, Step
from robustkit.train.step import total_loss


class TopShare(torch.autograd.Function):
    """One for the k highest scores of a tensor, else zero; backward, the gradient goes straight through to all."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int) -> Tensor:  # noqa: ANN401
        """Return the mask, of the scores' shape."""
        flat = torch.zeros_like(scores).flatten()
        return flat.index_fill_(0, scores.flatten().topk(k).indices, 1.0).view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Return the gradient of the mask as that of the scores."""
        return gradients[0], None


class Learned(nn.Module):
    """A weight times the mask of its k highest |scores| (Sehwag et al. 2020, HYDRA, arXiv 2002.10509, eq. 5).

    Scores start at the weights over their largest, times sqrt(6 / inputs), as in the paper's section 3.
    """

    def __init__(self, weight: Tensor, mask: Tensor, k: int) -> None:
        super().__init__()
        inputs = weight[0].numel()
        scaled = weight / weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
        self.scores = nn.Parameter(math.sqrt(6 / inputs) * scaled)
        self.register_buffer("mask", mask)
        self.k = k

    def importance(self) -> Tensor:
        """Return the absolute scores of what is not dropped already."""
        return self.scores.abs() * self.get_buffer("mask")

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        kept: Tensor = TopShare.apply(self.importance(), self.k)
        return weight * kept


@dataclass(frozen=True)
class ScoreTraining:
    """How long and with what scores are learned: SGD with momentum 0.9 on a cosine schedule."""

    epochs: int
    batch_size: int
    lr: float


def hydra_scores(
    model: nn.Module, current: Masks, counts: Mapping[str, int], context: CompressContext, training: ScoreTraining
) -> Scores:
    """Return learned scores of every prunable weight; the model and its defenses are left alone.

    `counts`: how many weights each layer loses, by the weight's name.

    Raises:
        ModelError: there are no training images.
    """
    if context.train is None or not len(context.train):
        raise ModelError("hydra needs training images; pass `train` to MaskKeeper")
    learner = copy.deepcopy(model).requires_grad_(False)
    learned = _with_scores(learner, current, counts)
    scores = [one.scores for one in learned.values()]
    optimizer = torch.optim.SGD(scores, lr=training.lr, momentum=0.9)
    defenses = [(label, copy.deepcopy(defense)) for label, defense in context.defenses]
    with torch.enable_grad():
        _learn(learner, optimizer, defenses, context, training)
    return {(f"{name}.weight" if name else "weight"): one.importance().detach() for name, one in learned.items()}


def _with_scores(learner: nn.Module, current: Masks, counts: Mapping[str, int]) -> dict[str, Learned]:
    layers = {name: module for name, module in learner.named_modules() if isinstance(module, PRUNABLE)}
    learned = {}
    for name, module in layers.items():
        weight = module.weight.detach()
        key = f"{name}.weight" if name else "weight"
        learned[name] = Learned(weight, current.of(key, weight), max(1, weight.numel() - counts[key]))
        parametrize.register_parametrization(module, "weight", learned[name])
    return learned


def _learn(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    defenses: Sequence[tuple[str, Defense]],
    context: CompressContext,
    training: ScoreTraining,
) -> None:
    assert context.train is not None
    train, device = context.train, context.example.device
    with torch.no_grad():
        classes = learner.eval()(context.example).shape[1]
    draw = torch.Generator(device=device).manual_seed(int(torch.randint(2**31, (1,), generator=context.generator)))
    steps = -(-len(train) // training.batch_size) * training.epochs
    done = 0
    learner.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=context.generator)))
        for epoch in range(training.epochs):
            for index in epoch_order(len(train), context.generator).split(training.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * done / steps))
                drawn = train.select(index)
                images = drawn.floats(0, len(drawn)).to(device)
                batch = Batch(images, drawn.labels.to(device), drawn.index.to(device), classes)
                step = Step(learner, epoch, training.epochs, done / steps, context.threat, draw, 1 / steps)
                _score_step(batch, [(defense, step) for _, defense in defenses], learner, optimizer)
                done += 1


def _score_step(
    batch: Batch, hooked: Sequence[tuple[Defense, Step]], learner: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Do one step of the scores on the variant's loss: as a training step, without what hooks do to weights."""
    for defense, step in hooked:
        batch = defense.transform_batch(batch, step)
    for defense, step in hooked:
        found = defense.perturb(batch, step)
        if found is not None:
            batch.x_adv = found.detach()
    optimizer.zero_grad(set_to_none=True)
    total_loss(batch, Forward(learner, batch), hooked).backward()
    optimizer.step()


@dataclass(frozen=True)
class Hydra:
    """Prune by scores learned on the frozen weights with the loss of the variant's defenses (Sehwag et al. 2020)."""

    sparsity: Fraction
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 0.1
    layers: Literal["equal", "magnitude"] = "equal"
    """How much each layer loses: the same share, as published, or what pruning by magnitude over all layers takes."""
    max_layer_sparsity: Fraction = 0.999

    @property
    def schedule(self) -> Schedule:
        """The scores are learned once, before the fine-tuning."""
        return "one_shot"

    @property
    def begin(self) -> float:
        """Unused: the scores are learned once."""
        return 0.0

    @property
    def end(self) -> float:
        """Unused: the scores are learned once."""
        return 0.0

    @property
    def updates(self) -> int:
        """The scores are learned once."""
        return 1

    def masks(self, model: nn.Module, current: Masks, sparsity: float, context: CompressContext) -> Masks:
        """Return masks that drop the lowest learned scores of each layer.

        Raises:
            ModelError: there are no training images, more is dropped already, or a layer may not lose as much.
        """
        counts = self._counts(model, current, sparsity)
        training = ScoreTraining(self.epochs, self.batch_size, self.lr)
        return counted_masks(hydra_scores(model, current, counts, context, training), current, counts)

    def _counts(self, model: nn.Module, current: Masks, sparsity: float) -> dict[str, int]:
        scores = magnitude_scores(model)
        if self.layers == "equal":
            if sparsity > self.max_layer_sparsity:
                raise ModelError(over_cap(sparsity, self.max_layer_sparsity))
            return equal_counts(scores, sparsity)
        taken = global_masks(scores, current, sparsity, self.max_layer_sparsity).tensors
        return {name: int((taken[name] == 0).sum()) for name in scores}

    def check(self, model: nn.Module, context: CompressContext) -> None:
        """Check the sparsity reached."""
        check_sparsity(model, self.sparsity, "hydra")
