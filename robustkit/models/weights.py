"""Weights that were trained elsewhere: state dicts, read without running code, put into a model that is named."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from robustkit import registry
from robustkit.compress.masks import without_hooks
from robustkit.errors import ModelError, UsageError
from robustkit.models.build import Shape, build_model
from robustkit.models.normalized import Repeated
from robustkit.recipe.spec import Use

NESTED = ("state_dict", "model_state_dict", "model", "net")
"""Where checkpoints keep the weights beside other things."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before each name."""
ORIGINAL, MASK = "_orig", "_mask"
COUNTER = "num_batches_tracked"
"""Of batch norm; older files lack it, and nothing that is evaluated needs it."""


def load_weights(
    path: str | Path,
    *,
    model: str | Mapping[str, Mapping[str, Any] | None] | Use,
    shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    folder: Path | None = None,
    trust_plugins: bool = False,
) -> nn.Module:
    """Return a model with the weights of a file that another program wrote, in eval mode; it takes images in [0, 1].

    `path`: a state dict that `torch.save` wrote (.pt, .pth), alone or in a checkpoint beside other tensors and
    numbers, or plain safetensors. Nothing is unpickled but tensors. Masks of `torch.nn.utils.prune`
    (`weight_orig`, `weight_mask`) are multiplied in. `model`: a name, or {name: parameters}, e.g. "resnet18",
    "torchvision.resnet18", "net.py:Net". `shape` is (C, H, W). `mean`, `std`: one number a channel in [0, 1], what the
    model was trained to have its images normalized with; zeros and ones for images as they are. A class of a user's
    own needs `trust_plugins=True`.

    Raises:
        UsageError: unknown model or parameter, or code that is not trusted.
        ModelError: the file is broken, holds more than tensors, or does not fit the model; the message names a weight.
    """
    use = _use(model, folder)
    if registry.runs_user_code(registry.find("model", use.name, folder=folder)) and not trust_plugins:
        raise UsageError(f"{use.name} is code: read it; if you trust it, add --trust-plugins (trust_plugins=True)")
    if not all(one > 0 for one in std):
        raise UsageError(f"std: {', '.join(map(str, std))}: deviations are above 0")
    read = read_weights(Path(path))
    with torch.random.fork_rng(devices=[]):
        built = build_model(use, shape=shape, classes=classes, mean=mean, std=std, folder=folder)
    made = without_hooks(built)
    # A file knows nothing of what gives a model for colours its gray images.
    net = made.inner.inner if isinstance(made.inner, Repeated) else made.inner
    assert isinstance(net, nn.Module)
    _put(
        net, plain_weights(read, str(path), net.state_dict()), f"{path}: does not fit {use.name} for {classes} classes"
    )
    return made.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, on the CPU; nothing but tensors is ever unpickled.

    Raises:
        ModelError: no such file, broken, or not a state dict; a pickled model is refused.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path}: not a safetensors file, or a truncated one: {error}") from error
    try:
        # From memory: torch leaves a file open where the zip in it is broken.
        found = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors, or is broken; reading it could run code, so it is refused. Where you "
            "trust it, load it yourself and write torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # the unpickler raises anything on bytes that are none of its own
        raise ModelError(f"{path}: not a file of torch.save, or a truncated one: {_first_line(error)}") from error
    return _tensors(found, path)


def _tensors(found: object, path: Path) -> dict[str, Tensor]:
    for name in NESTED:
        inner = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(inner, Mapping):
            found = inner
            break
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{path}: holds {type(found).__name__}, no state dict")
    odd = [str(name) for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise ModelError(
            f"{path}: no state dict: {', '.join(odd[:3])} is no tensor; the weights may stand alone or under "
            f"{', '.join(NESTED)}"
        )
    unlike = [name for name, value in found.items() if not _is_dense(value)]
    if unlike:
        raise ModelError(
            f"{path}: {', '.join(unlike[:3])}: sparse, quantized, complex, nested or without values; weights are plain "
            "real numbers"
        )
    return dict(found)


def _is_dense(value: Tensor) -> bool:
    odd = value.is_nested or value.is_quantized or value.is_meta or value.is_complex()
    return value.layout is torch.strided and not odd


def plain_weights(
    state: Mapping[str, Tensor], where: str = "the state dict", known: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return a state dict without what wrappers put before its names and with masks of torch.nn.utils.prune applied.

    known: names that the model has; where there is one, nothing stands before it.

    Raises:
        ModelError: a mask without its weights, or one of another shape; weights that claim more than they hold.
    """
    found = dict(state)
    # Twice: either may stand before the other.
    for prefix in PREFIXES * 2:
        if found and all(name.startswith(prefix) and name not in known for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    for name in [name for name in found if name.endswith(MASK)]:
        stem = name.removesuffix(MASK)
        mask, weight = found.pop(name), found.pop(stem + ORIGINAL, None)
        if weight is None or weight.shape != mask.shape:
            size = "is not there" if weight is None else f"is {tuple(weight.shape)}"
            raise ModelError(f"{where}: {name} is a mask {tuple(mask.shape)}, but {stem}{ORIGINAL} {size}")
        if weight.numel() * weight.element_size() > weight.untyped_storage().nbytes():
            raise ModelError(f"{where}: {stem}{ORIGINAL} claims {weight.numel():,} numbers and holds fewer")
        found[stem] = weight * mask
    return found


def _use(model: str | Mapping[str, Mapping[str, Any] | None] | Use, folder: Path | None) -> Use:
    if isinstance(model, Use):
        return model
    if isinstance(model, Mapping) and len(model) != 1:
        raise UsageError("a model is written as a name or {name: {parameters}}")
    name, given = (model, None) if isinstance(model, str) else next(iter(model.items()))
    clean, mistakes = registry.check_parameters(registry.find("model", name, folder=folder), given or {})
    if mistakes:
        raise UsageError(f"model {name}: " + "; ".join(message for _, message in mistakes))
    return Use(name=name, parameters=clean, label=name)


def _put(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give a model these weights, in its own types.

    Raises:
        ModelError: names or shapes differ.
    """
    wanted = model.state_dict()
    missing = sorted(name for name in set(wanted) - set(state) if not name.endswith(COUNTER))
    extra = sorted(set(state) - set(wanted))
    if missing or extra:
        raise ModelError(f"{what}: missing {missing[:3]}, unknown {extra[:3]}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ModelError(f"{what}: {name} has shape {tuple(value.shape)}, the model {tuple(wanted[name].shape)}")
    model.load_state_dict({**wanted, **state}, strict=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
