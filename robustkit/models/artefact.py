"""Models as files: safetensors with the architecture as JSON beside the weights. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from robustkit import registry
from robustkit.compress.masks import without_hooks
from robustkit.errors import ModelError, UsageError
from robustkit.models.architecture import FORMAT, ONNX_SUFFIX, Architecture, Wrapper, read_architecture
from robustkit.models.build import build_inner
from robustkit.models.meta import at_most, without_memory
from robustkit.models.normalized import Normalized
from robustkit.models.onnx_model import OnnxModel, load_onnx, with_metadata
from robustkit.models.quantized import Quantized
from robustkit.models.quantized_file import QuantizedFile, load_quantized
from robustkit.models.vote import Vote
from robustkit.models.widths import apply_widths, widths_of
from robustkit.models.wrapped import Wrapped
from robustkit.recipe.spec import Use
from robustkit.store import write_atomic
from robustkit.train.hooks import Defense, is_joined

MEMBER = "wrappers.{}.members.{}."
"""What stands before the names of the tensors of a model that answers beside another one."""
BESIDE = "wrappers."
Members = Mapping[str, Sequence[Path]]
"""By the label of a wrapper: the files of the models that it takes."""


def save_model(
    model: nn.Module,
    path: Path,
    use: Use,
    *,
    shape: tuple[int, int, int],
    classes: Sequence[str],
    wrappers: Sequence[Use] = (),
    members: Members | None = None,
) -> None:
    """Write a plain model that was made by `build_model`, shrunk, quantized or not, or a vote of such; atomically.

    `wrappers`: the defenses that wrap it for inference; `members`: the files of models that answer beside it, which
    are written into this one.
    """
    if isinstance(model, OnnxModel) and members:
        raise ModelError(f"{path}: an ONNX file has no room for models that answer beside its own")
    held = model.tensors() if isinstance(model, Quantized) else model.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in held.items()}
    described = []
    for number, one in enumerate(wrappers):
        beside = []
        for place, file in enumerate((members or {}).get(one.label, ())):
            beside.append(read_architecture(file))
            tensors |= {MEMBER.format(number, place) + name: value for name, value in _tensors(file).items()}
        described.append(Wrapper(name=one.name, parameters=one.parameters, members=tuple(beside)))
    architecture = Architecture(
        format=FORMAT,
        model=use.name,
        parameters=use.parameters,
        shape=shape,
        classes=tuple(classes),
        members=len(model.members) if isinstance(model, Vote) else 0,
        widths=widths_of(model),
        wrappers=tuple(described),
        quantized=QuantizedFile(made=model.made, program=model.program) if isinstance(model, Quantized) else None,
    )
    told = _text(architecture)
    if isinstance(model, OnnxModel):
        write_atomic(path, with_metadata(model, told))
        return
    write_atomic(path, save(tensors, metadata={"robustkit": told}))


def _text(described: Architecture) -> str:
    values = described.model_dump(mode="json", exclude={"quantized"})
    if described.quantized is not None:
        # What a graph's calls do not have is left out: there are hundreds of them.
        values["quantized"] = described.quantized.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(values, separators=(",", ":"))


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ONNX_SUFFIX:
        raise ModelError(f"{path}: an ONNX file cannot answer beside another model")
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class _Source:
    """A file that models are made from, and the code that may be needed for it."""

    path: Path
    names: frozenset[str]
    folder: Path | None
    plugins: Sequence[Path]
    trusted: bool

    def own(self, prefix: str) -> frozenset[str]:
        """Return the names of the tensors of the model under a prefix, without those of models beside it."""
        below = (name.removeprefix(prefix) for name in self.names if name.startswith(prefix))
        return frozenset(name for name in below if not name.startswith(BESIDE))

    def allow(self, entry: registry.Entry, name: str) -> None:
        """Refuse code of a user's own that is not trusted."""
        if registry.runs_user_code(entry) and not self.trusted:
            raise ModelError(f"{self.path}: needs code from {name}; pass trust_plugins=True if you trust it")


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
    names = frozenset() if path.suffix == ONNX_SUFFIX else _names(path)
    source = _Source(path, names, folder, tuple(plugins), trust_plugins)
    stray = [
        name for name in source.names if name.startswith(BESIDE) and not name.startswith(tuple(_prefixes(described)))
    ]
    if stray:
        raise ModelError(f"{path}: weights do not fit the architecture: unknown {sorted(stray)[:3]}")
    return _made(source, described, wrapped=wrapped)


def _names(path: Path) -> frozenset[str]:
    with safe_open(str(path), framework="pt") as file:
        return frozenset(file.keys())


def _prefixes(described: Architecture, prefix: str = "") -> Iterator[str]:
    """Yield what stands before the names of the tensors of each model beside another one."""
    for number, wrapper in enumerate(described.wrappers):
        for place, member in enumerate(wrapper.members):
            here = prefix + MEMBER.format(number, place)
            yield here
            yield from _prefixes(member, here)


def _made(source: _Source, described: Architecture, prefix: str = "", *, wrapped: bool = True) -> nn.Module:
    """Return the model whose tensors stand under a prefix."""
    own = source.own(prefix)
    wrappers = [
        _wrapper(source, described, number, prefix) for number in range(len(described.wrappers) if wrapped else 0)
    ]
    if source.path.suffix == ONNX_SUFFIX:
        model: nn.Module = load_onnx(source.path, len(described.classes), described.shape)
    elif described.quantized is not None:
        # Its graph is in the file, so that no code of its architecture is run.
        model = load_quantized(source.path, described.quantized, described.shape, len(described.classes), own, prefix)
    else:
        model = _floating(source, described, own, prefix)
    return Wrapped(model, wrappers).eval() if wrappers else model.eval()


def _floating(source: _Source, described: Architecture, own: frozenset[str], prefix: str) -> nn.Module:
    """Return the plain model of an architecture with its tensors, which stand under a prefix."""
    use = Use(name=described.model, parameters=described.parameters, label=described.model)
    try:
        entry = registry.find("model", use.name, folder=source.folder, plugins=source.plugins)
        _, mistakes = registry.check_parameters(entry, use.parameters)
    except UsageError as error:
        raise ModelError(f"{source.path}: {error}") from error
    if mistakes:
        raise ModelError(f"{source.path}: {mistakes[0][1]}")
    source.allow(entry, use.name)
    model = _skeleton(source, use, described, len(own), on_meta=not registry.runs_user_code(entry))
    _fill(model, source.path, own, prefix)
    return model


def _wrapper(source: _Source, described: Architecture, number: int, prefix: str) -> Defense:
    one = described.wrappers[number]
    try:
        entry = registry.find("defense", one.name, folder=source.folder, plugins=source.plugins)
        source.allow(entry, one.name)
        values, mistakes = registry.check_parameters(entry, one.parameters)
        if mistakes:
            raise ModelError(f"{source.path}: wrapper {one.name}: {mistakes[0][1]}")
        defense = registry.create(entry, values)
        if not isinstance(defense, Defense):
            raise ModelError(f"{source.path}: wrapper {one.name} is no defense")
        if is_joined(defense):
            defense.take_members(_members(source, described, number, prefix))
    except UsageError as error:
        raise ModelError(f"{source.path}: wrapper {one.name}: {error}") from error
    return defense


def _members(source: _Source, described: Architecture, number: int, prefix: str) -> list[nn.Module]:
    found = []
    for place, member in enumerate(described.wrappers[number].members):
        if member.shape != described.shape or member.classes != described.classes:
            raise ModelError(
                f"{source.path}: its member {place + 1} takes images {member.shape} of {len(member.classes)} classes, "
                f"the model {described.shape} of {len(described.classes)}; all must take and know the same"
            )
        found.append(_made(source, member, prefix + MEMBER.format(number, place)))
    return found


def _skeleton(source: _Source, use: Use, described: Architecture, tensors: int, *, on_meta: bool) -> nn.Module:
    channels = described.shape[0]
    try:
        # On the meta device nothing is allocated, whatever sizes the file claims.
        with without_memory(use.name) if on_meta else torch.device("cpu"), at_most(tensors):
            built = [
                build_inner(
                    use,
                    shape=described.shape,
                    classes=len(described.classes),
                    folder=source.folder,
                    plugins=source.plugins,
                )
                for _ in range(max(1, described.members))
            ]
            whole = [without_hooks(Normalized(inner, [0.0] * channels, [1.0] * channels)) for inner in built]
            if described.members:
                return Vote(whole)
            apply_widths(whole[0], described.widths)
            return whole[0]
    except (ModelError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{source.path}: its architecture cannot be built: {error}") from error


def _fill(model: nn.Module, path: Path, names: frozenset[str], prefix: str) -> None:
    """Give a model the tensors of a file whose names stand after a prefix."""
    wanted = model.state_dict()
    try:
        with safe_open(str(path), framework="pt") as file:
            missing, extra = sorted(set(wanted) - names), sorted(names - set(wanted))
            if missing or extra:
                raise ModelError(
                    f"{path}: weights do not fit the architecture: missing {missing[:3]}, unknown {extra[:3]}"
                )
            for name, tensor in wanted.items():
                shape = tuple(file.get_slice(prefix + name).get_shape())
                if shape != tuple(tensor.shape):
                    raise ModelError(f"{path}: {name} has shape {shape}, the architecture has {tuple(tensor.shape)}")
            # Copies: unaligned memory, as in the file, takes other kernels, whose last bits differ.
            state = {name: file.get_tensor(prefix + name).clone() for name in wanted}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: truncated or broken: {error}") from error
    for name, tensor in wanted.items():
        if state[name].dtype != tensor.dtype:
            raise ModelError(f"{path}: {name} is {state[name].dtype}, the architecture has {tensor.dtype}")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)
