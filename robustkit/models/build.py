"""From a recipe's `model:` to a module that takes images in [0, 1]."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.errors import ModelError
from robustkit.models.normalized import Normalized, Repeated
from robustkit.recipe.spec import Use

Shape = tuple[int, int, int]
SINGLE_OUTPUT: dict[str, dict[str, bool]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("torchvision.googlenet", "torchvision.inception_v3")
}
"""Models that return auxiliary outputs in training, which no loss takes here; they warn of their first weights too."""


def build_model(
    use: Use,
    *,
    shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    folder: Path | None = None,
    plugins: Sequence[Path] = (),
) -> Normalized:
    """Return the model that a recipe names, wrapped so that it takes images in [0, 1]; weights by torch's seed.

    Raises:
        ModelError: the model does not fit images of this shape; the message names the layer and the sizes. Or mean
            and std are not one number a channel.
    """
    if not len(mean) == len(std) == shape[0]:
        raise ModelError(f"normalize: {len(mean)} means and {len(std)} deviations for images of {shape[0]} channels")
    inner = build_inner(use, shape=shape, classes=classes, folder=folder, plugins=plugins)
    model = Normalized(inner, mean, std)
    check_fit(model, shape, classes, use.name)
    return model


def build_inner(
    use: Use, *, shape: Shape, classes: int, folder: Path | None = None, plugins: Sequence[Path] = ()
) -> nn.Module:
    """Return the bare model: what builders ask for by name (shape, classes, num_classes, in_channels) is filled in."""
    entry = registry.find("model", use.name, folder=folder, plugins=plugins)
    builder = registry.load(entry)
    if entry.origin == "torchvision":
        model = _torchvision(builder, use, classes)
        return Repeated(model) if shape[0] == 1 else model
    context = {"shape": shape, "classes": classes, "num_classes": classes, "in_channels": shape[0]}
    asked = _arguments(builder)
    filled = {name: value for name, value in context.items() if name in asked}
    model = builder(**filled, **use.parameters)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {use.name!r} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _torchvision(builder: Callable[..., nn.Module], use: Use, classes: int) -> nn.Module:
    """Return a model of torchvision, its weights by torch's seed.

    Raises:
        ModelError: it cannot be made with these parameters.
    """
    try:
        given = {**SINGLE_OUTPUT.get(use.name, {}), **use.parameters}
        return builder(weights=None, num_classes=classes, **given)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"model {use.name} cannot be made with {use.parameters}: {error}") from error


def _arguments(builder: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(builder).parameters)


def check_fit(model: nn.Module, shape: Shape, classes: int, name: str) -> None:
    """Run the model once on zeros; it keeps its mode and its buffers.

    Raises:
        ModelError: a layer cannot take its input, or the output is not (N, classes).
    """
    entered: list[tuple[str, tuple[int, ...]]] = []

    def note(label: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
            if inputs and isinstance(inputs[0], Tensor):
                entered.append((label, tuple(inputs[0].shape[1:])))

        return hook

    leaves = [(label, module) for label, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_pre_hook(note(label)) for label, module in leaves]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
        label, size = entered[-1] if entered else ("the first", shape)
        kind = dict(leaves).get(label)
        raise ModelError(
            f"model {name} does not fit images of {shape}: layer {label.removeprefix('inner.')} ({kind}) "
            f"got {size}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"model {name} returns {got} for 2 images of {classes} classes; (2, {classes}) is needed")
