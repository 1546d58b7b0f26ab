"""Stages of one training: what each epoch takes from its stage instead of from `train:` (Howard & Ruder 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustkit.errors import ModelError, TrainingError
from robustkit.recipe.spec import StageSpec, TrainSpec

WRAPPED = "inner."


def stage_at(spec: TrainSpec, epoch: int) -> StageSpec:
    """Return the stage that an epoch (from 0) belongs to; without stages, one that changes nothing."""
    first = 0
    for stage in spec.stages:
        first += stage.epochs
        if epoch < first:
            return stage
    return StageSpec(epochs=spec.epochs)


def batch_size_at(spec: TrainSpec, epoch: int) -> int:
    """Return how many images a batch of an epoch has."""
    return stage_at(spec, epoch).batch_size or spec.batch_size


def steps_from(spec: TrainSpec, epoch: int, images: int) -> int:
    """Return how many batches the epochs from this one on have together."""
    return sum(math.ceil(images / batch_size_at(spec, one)) for one in range(epoch, spec.epochs))


def full_eps(spec: TrainSpec, epoch: int) -> bool:
    """Say whether an epoch trains at the largest eps of any stage: only its weights may be chosen as the best."""
    return stage_at(spec, epoch).eps == max((stage.eps for stage in spec.stages), default=1.0)


def resized(x: Tensor, resolution: int | None) -> Tensor:
    """Return images (N, C, H, W) with `resolution` pixels a side, still in their range; as they are for None."""
    if resolution is None or x.shape[-2:] == (resolution, resolution):
        return x
    return functional.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True).clamp(0, 1)


def named(name: str, prefixes: tuple[str, ...]) -> bool:
    """Say whether one of the prefixes is this dotted name or stands before one of its dots.

    Names count from the model of the recipe: what normalizes its images around it has no name.
    """
    own = name.removeprefix(WRAPPED)
    return any(one == prefix or one.startswith(f"{prefix}.") for prefix in prefixes for one in (name, own))


def set_modes(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Put a model into training mode but for its frozen layers, whose batch norms keep their statistics too."""
    model.train()
    for name, module in model.named_modules():
        if name and named(name, frozen):
            module.eval()


def freeze(model: nn.Module, frozen: tuple[str, ...], trained: frozenset[str]) -> None:
    """Let gradients reach the parameters `trained` (names) but for those of the frozen layers."""
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(not named(name, frozen))


def check_stages(model: nn.Module, spec: TrainSpec, shape: tuple[int, ...], device: torch.device) -> None:
    """Look at every stage before the first step.

    Raises:
        TrainingError: a name under `freeze` is none of the model's layers, or nothing is left to train.
        ModelError: the model does not take images of a stage's resolution.
    """
    for number, stage in enumerate(spec.stages, 1):
        _check_frozen(model, number, stage)
        if stage.resolution is not None:
            _check_resolution(model, number, stage.resolution, shape[0], device)


def _check_frozen(model: nn.Module, number: int, stage: StageSpec) -> None:
    names = [name for name, _ in model.named_parameters()]
    for prefix in stage.freeze:
        if not any(named(name, (prefix,)) for name in names):
            known = ", ".join(sorted({name.removeprefix(WRAPPED).partition(".")[0] for name in names}))
            raise TrainingError(f"stage {number}: the model has no layer {prefix!r} to freeze; its layers: {known}")
    if all(named(name, stage.freeze) for name in names):
        raise TrainingError(f"stage {number}: every layer is frozen; leave one to train, e.g. the last")


def _check_resolution(model: nn.Module, number: int, side: int, channels: int, device: torch.device) -> None:
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(2, channels, side, side, device=device))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"stage {number}: the model does not take images of {side}x{side}; drop `resolution`, choose "
            "one nearer to the images' own, or train a model that pools to a fixed size"
        ) from error
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
