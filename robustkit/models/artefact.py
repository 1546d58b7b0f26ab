"""Models as files: safetensors with the architecture as JSON beside the weights. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from robustkit import registry
from robustkit.compress.masks import without_hooks
from robustkit.errors import ModelError, UsageError
from robustkit.models.build import Shape, build_inner
from robustkit.models.meta import at_most, without_memory
from robustkit.models.normalized import Normalized
from robustkit.models.onnx_model import OnnxModel, load_onnx, onnx_metadata, with_metadata
from robustkit.models.quantized import Quantized
from robustkit.models.quantized_file import QuantizedFile, load_quantized
from robustkit.models.vote import Vote
from robustkit.models.widths import Width, apply_widths, widths_of
from robustkit.models.wrapped import Wrapped
from robustkit.recipe.spec import Use
from robustkit.store import write_atomic
from robustkit.train.hooks import Defense

FORMAT = "robustkit/1"
MAX_SIDE = 65_536
MAX_MEMBERS = 10_000
ONNX_SUFFIX = ".onnx"


class Wrapper(BaseModel):
    """An inference wrapper of a model: the defense that makes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    parameters: dict[str, Any] = {}


class Architecture(BaseModel):
    """What a model file says of its architecture."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    model: str
    parameters: dict[str, Any] = {}
    shape: Shape
    classes: tuple[str, ...] = Field(min_length=2)
    members: int = Field(0, ge=0, le=MAX_MEMBERS)
    """So many models of this architecture vote; 0: it is one model, which answers itself."""
    widths: dict[str, Width] = {}
    """Layers that are narrower than the model's own, by name: those of a shrunk model."""
    wrappers: tuple[Wrapper, ...] = ()
    """From the inside out."""
    quantized: QuantizedFile | None = None
    """Of a quantized model: its graph, which does not follow from the architecture alone."""


def save_model(
    model: nn.Module, path: Path, use: Use, *, shape: Shape, classes: Sequence[str], wrappers: Sequence[Use] = ()
) -> None:
    """Write a plain model that was made by `build_model`, shrunk, quantized or not, or a vote of such; atomically.

    `wrappers`: the defenses that wrap it for inference.
    """
    described = Architecture(
        format=FORMAT,
        model=use.name,
        parameters=use.parameters,
        shape=shape,
        classes=tuple(classes),
        members=len(model.members) if isinstance(model, Vote) else 0,
        widths=widths_of(model),
        wrappers=tuple(Wrapper(name=one.name, parameters=one.parameters) for one in wrappers),
        quantized=QuantizedFile(made=model.made, program=model.program) if isinstance(model, Quantized) else None,
    )
    if isinstance(model, OnnxModel):
        write_atomic(path, with_metadata(model, described.model_dump_json(exclude_defaults=True)))
        return
    held = model.tensors() if isinstance(model, Quantized) else model.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in held.items()}
    write_atomic(path, save(tensors, metadata={"robustkit": _text(described)}))


def _text(described: Architecture) -> str:
    values = described.model_dump(mode="json", exclude={"quantized"})
    if described.quantized is not None:
        # What a graph's calls do not have is left out: there are hundreds of them.
        values["quantized"] = described.quantized.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(values, separators=(",", ":"))


def is_model_file(path: Path) -> bool:
    """Say whether a file is safetensors with an architecture of robustkit's; a broken one counts if it is named so.

    Raises:
        ModelError: there is no such file, or it is named .safetensors and cannot be read.
    """
    if path.is_file() and path.suffix not in (".safetensors", ONNX_SUFFIX):
        return False
    return "robustkit" in _metadata(path)


def read_architecture(path: Path) -> Architecture:
    """Return what a model file says of itself.

    Raises:
        ModelError: no such file, not safetensors, truncated, or not written by robustkit.
    """
    metadata = _metadata(path)
    if "robustkit" not in metadata:
        raise ModelError(
            f"{path}: holds weights but no robustkit architecture; robustkit.load_weights and `robustkit attack "
            "--model` take the model's name beside it"
        )
    try:
        found = Architecture.model_validate(json.loads(metadata["robustkit"]))
    except (ValidationError, ValueError) as error:
        raise ModelError(f"{path}: its architecture cannot be read: {error}") from error
    if found.format != FORMAT:
        raise ModelError(f"{path}: written in format {found.format!r}; this version reads {FORMAT!r}")
    if not all(1 <= side <= MAX_SIDE for side in found.shape):
        raise ModelError(f"{path}: images of shape {found.shape} are absurd")
    return found


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if path.suffix == ONNX_SUFFIX:
        return onnx_metadata(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        if _pickled(path):
            raise ModelError(
                f"{path}: a pickle or a file of torch.save, which can run code; robustkit.load reads safetensors. "
                "A state dict is read by robustkit.load_weights and `robustkit attack --model`"
            ) from error
        raise ModelError(f"{path}: not a safetensors file, or a truncated one: {error}") from error


def _pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_model(
    path: Path | str,
    *,
    folder: Path | None = None,
    plugins: Sequence[Path] = (),
    trust_plugins: bool = False,
    wrapped: bool = True,
) -> nn.Module:
    """Return the model of a file in eval mode; its logits are bit-equal to those of the model that was saved.

    A model of a user's own class needs `trust_plugins=True`: making it runs that class's code. `folder` is where
    relative files of code start; `plugins` are files in which the class is found by its bare name. A model that was
    saved with inference wrappers comes back behind them (`Wrapped`), or with `wrapped=False` as the plain model.

    Raises:
        ModelError: broken file, unknown architecture, or weights that do not fit it (checked before any is read).
    """
    path = Path(path)
    described = read_architecture(path)
    if path.suffix == ONNX_SUFFIX:
        wrappers = _wrappers(path, described, folder, plugins, trust_plugins) if wrapped else []
        made = load_onnx(path, len(described.classes), described.shape)
        return Wrapped(made, wrappers).eval() if wrappers else made
    use = Use(name=described.model, parameters=described.parameters, label=described.model)
    try:
        entry = registry.find("model", use.name, folder=folder, plugins=plugins)
        _, mistakes = registry.check_parameters(entry, use.parameters)
    except UsageError as error:
        raise ModelError(f"{path}: {error}") from error
    if mistakes:
        raise ModelError(f"{path}: {mistakes[0][1]}")
    own = registry.runs_user_code(entry)
    if described.quantized is not None:
        return _quantized(path, described, folder, plugins, trust_plugins, wrapped)
    if own and not trust_plugins:
        raise ModelError(f"{path}: needs code from {use.name}; pass trust_plugins=True if you trust it")
    model = _skeleton(path, use, described, folder, plugins, on_meta=not own)
    wrappers = _wrappers(path, described, folder, plugins, trust_plugins) if wrapped else []
    _fill(model, path)
    return Wrapped(model, wrappers).eval() if wrappers else model.eval()


def _quantized(
    path: Path,
    described: Architecture,
    folder: Path | None,
    plugins: Sequence[Path],
    trust_plugins: bool,
    wrapped: bool,
) -> nn.Module:
    """Return the quantized model of a file: its graph is in it, so that no code of its architecture is run."""
    assert described.quantized is not None
    wrappers = _wrappers(path, described, folder, plugins, trust_plugins) if wrapped else []
    model = load_quantized(path, described.quantized, described.shape, len(described.classes))
    return Wrapped(model, wrappers).eval() if wrappers else model


def _wrappers(
    path: Path, described: Architecture, folder: Path | None, plugins: Sequence[Path], trust_plugins: bool
) -> list[Defense]:
    made = []
    for one in described.wrappers:
        try:
            entry = registry.find("defense", one.name, folder=folder, plugins=plugins)
            if registry.runs_user_code(entry) and not trust_plugins:
                raise ModelError(f"{path}: needs code from {one.name}; pass trust_plugins=True if you trust it")
            values, mistakes = registry.check_parameters(entry, one.parameters)
            if mistakes:
                raise ModelError(f"{path}: wrapper {one.name}: {mistakes[0][1]}")
            defense = registry.create(entry, values)
        except UsageError as error:
            raise ModelError(f"{path}: wrapper {one.name}: {error}") from error
        if not isinstance(defense, Defense):
            raise ModelError(f"{path}: wrapper {one.name} is no defense")
        made.append(defense)
    return made


def _skeleton(
    path: Path, use: Use, described: Architecture, folder: Path | None, plugins: Sequence[Path], on_meta: bool
) -> nn.Module:
    channels = described.shape[0]
    try:
        # On the meta device nothing is allocated, whatever sizes the file claims.
        with without_memory(use.name) if on_meta else torch.device("cpu"), at_most(_count(path)):
            built = [
                build_inner(use, shape=described.shape, classes=len(described.classes), folder=folder, plugins=plugins)
                for _ in range(max(1, described.members))
            ]
            whole = [without_hooks(Normalized(inner, [0.0] * channels, [1.0] * channels)) for inner in built]
            if described.members:
                return Vote(whole)
            apply_widths(whole[0], described.widths)
            return whole[0]
    except (ModelError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{path}: its architecture cannot be built: {error}") from error


def _count(path: Path) -> int:
    """Return how many tensors a file holds."""
    with safe_open(str(path), framework="pt") as file:
        return len(file.keys())


def _fill(model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted(set(wanted) - names), sorted(names - set(wanted))
            if missing or extra:
                raise ModelError(
                    f"{path}: weights do not fit the architecture: missing {missing[:3]}, unknown {extra[:3]}"
                )
            for name, tensor in wanted.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(tensor.shape):
                    raise ModelError(f"{path}: {name} has shape {shape}, the architecture has {tuple(tensor.shape)}")
            # Copies: where a tensor lies in the file decides its alignment, and that the last bit of some sums.
            state = {name: file.get_tensor(name).clone() for name in wanted}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: truncated or broken: {error}") from error
    for name, tensor in wanted.items():
        if state[name].dtype != tensor.dtype:
            raise ModelError(f"{path}: {name} is {state[name].dtype}, the architecture has {tensor.dtype}")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)
