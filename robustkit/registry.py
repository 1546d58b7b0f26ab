"""Names of plugins: where each lives and how to make one. No plugin's module is imported until it is made."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from robustkit import __version__
from robustkit.builtin import BUILTIN as BUILTIN
from robustkit.builtin import ENTRY_POINTS
from robustkit.builtin import KINDS as KINDS
from robustkit.builtin import Kind as Kind
from robustkit.checking import check_values
from robustkit.classes import is_pruning_method, literal_of
from robustkit.errors import UsageError, did_you_mean
from robustkit.modules import absolute, code_of, import_file, module_file, package_folder, source_of
from robustkit.params import Integer, Number
from robustkit.signatures import (
    Parameter,
    classes_of,
    functions_of,
    parameters_of_object,
    read_parameters,
    read_summary,
)

TORCHATTACKS = "torchattacks."
TORCHVISION = "torchvision."
PRUNING = Path(__file__).parent / "compress" / "torch_methods.py"
COUNT_OR_SHARE = Integer | Number
Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A plugin that was found: its target is `module:attribute`, or `file.py:attribute` with `file` set."""

    kind: Kind
    name: str
    target: str
    origin: str
    file: Path | None = None

    @property
    def attribute(self) -> str:
        """The class or function inside the module."""
        return self.target.rpartition(":")[2]


@dataclass
class Registered:
    """Plugins that this process registered from Python."""

    objects: dict[tuple[Kind, str], Callable[..., Any]] = field(default_factory=dict)


_registered = Registered()


def register(kind: Kind, name: str | None = None) -> Callable[[Made], Made]:
    """Register a class or function as a plugin of this process: `@robustkit.register("defense")`.

    Raises:
        UsageError: unknown kind, or the name belongs to a built-in plugin.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")

    def decorate(made: Made) -> Made:
        label = name or _snake(made.__name__)
        if label in BUILTIN[kind]:
            raise UsageError(f"{label!r} is a built-in {kind}; choose another name")
        _registered.objects[kind, label] = made
        return made

    return decorate


def names(kind: Kind) -> tuple[str, ...]:
    """Return the plain names of a kind: built-in, from entry points, and registered."""
    registered = [name for of, name in _registered.objects if of == kind]
    return tuple(dict.fromkeys([*BUILTIN[kind], *_entry_points(kind), *registered]))


def find(kind: Kind, name: str, *, folder: Path | None = None, plugins: Sequence[Path] = ()) -> Entry:
    """Return where a plugin lives. `folder` is where relative file names start; `plugins` are the recipe's files.

    Raises:
        UsageError: there is no such plugin; the message names the closest ones.
    """
    if name in BUILTIN[kind]:
        target = BUILTIN[kind][name]
        return Entry(kind, name, target, "builtin", module_file(target.partition(":")[0]))
    if (kind, name) in _registered.objects:
        made = _registered.objects[kind, name]
        return Entry(kind, name, f"{made.__module__}:{made.__qualname__}", "registered", source_of(made))
    if kind == "attack" and name.startswith(TORCHATTACKS):
        return _library(kind, name, TORCHATTACKS, torchattacks_files())
    if kind == "model" and name.startswith(TORCHVISION):
        return _library(kind, name, TORCHVISION, torchvision_files())
    for path in plugins:
        file = absolute(path, folder)
        if read_summary(file, name) is not None:
            return Entry(kind, name, f"{file}:{name}", f"file {path}", file)
    points = _entry_points(kind)
    if name in points:
        return Entry(kind, name, points[name], "entry point", module_file(points[name].partition(":")[0]))
    if ":" in name:
        return _dotted(kind, name, folder)
    hint = did_you_mean(name, names(kind)) or f"`robustkit list {kind}` shows them all"
    raise UsageError(f"unknown {kind} {name!r}; {hint}")


def _library(kind: Kind, name: str, prefix: str, files: Mapping[str, Path]) -> Entry:
    attribute = name.removeprefix(prefix)
    if attribute not in files:
        hint = did_you_mean(attribute, files)
        raise UsageError(f"unknown {kind} {name!r}" + (f"; {hint}" if hint else ""))
    return Entry(kind, name, f"{prefix.rstrip('.')}:{attribute}", prefix.rstrip("."), files[attribute])


def _dotted(kind: Kind, name: str, folder: Path | None) -> Entry:
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        file: Path | None = absolute(Path(where), folder)
        target, origin = f"{file}:{attribute}", f"file {where}"
    else:
        file, target, origin = module_file(where), name, f"module {where}"
    if file is None or not file.is_file():
        raise UsageError(f"{kind} {name!r}: there is no file or module {where!r}")
    if read_summary(file, attribute) is None:
        raise UsageError(f"{kind} {name!r}: {file} defines no {attribute!r}")
    return Entry(kind, name, target, origin, file)


def runs_user_code(entry: Entry) -> bool:
    """Say whether making this plugin runs code from outside robustkit, torchattacks, torchvision and torch."""
    return entry.origin.startswith(("file", "module")) and not entry.target.startswith("torch.nn.utils.prune:")


def source_hash(entry: Entry) -> str:
    """Return what stands for the plugin's source in a step's key: a version, or the sha256 of a user's source."""
    if entry.origin == "builtin":
        return f"robustkit {__version__}"
    if entry.origin in ("torchattacks", "torchvision"):
        return f"{entry.origin} {importlib.metadata.version(entry.origin)}"
    if entry.file is None and entry.origin == "registered":
        return hashlib.sha256(code_of(_registered.objects[entry.kind, entry.name]).encode()).hexdigest()
    if entry.file is None:
        return entry.target
    try:
        return hashlib.sha256(entry.file.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{entry.file}: cannot be read: {error.strerror}") from error


def summary(entry: Entry) -> str:
    """Return the first line of the plugin's docstring, read from its source."""
    return (read_summary(entry.file, entry.attribute) or "") if entry.file else ""


def parameters(entry: Entry) -> tuple[Parameter, ...]:
    """Return the plugin's parameters, read from its source without running it."""
    if entry.origin == "registered":
        found = parameters_of_object(_registered.objects[entry.kind, entry.name])
        return _with_timing(found) if is_torch_pruning(entry) else found
    if entry.file is None:
        return ()
    if entry.origin == "torchvision":
        from robustkit.models.torchvision_signatures import builder_parameters

        return builder_parameters(entry.file, entry.attribute)
    found = read_parameters(entry.file, entry.attribute, untyped=entry.origin != "builtin")
    if is_torch_pruning(entry):
        return _with_timing(found)
    if entry.origin == "torchattacks":
        from robustkit.attacks.torchattacks_table import FIXED_BY_ROBUSTKIT

        return tuple(one for one in found if one.name not in FIXED_BY_ROBUSTKIT)
    return found


def _with_timing(own: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """Return the parameters of a method for torch.nn.utils.prune with those that say when it prunes."""
    names = {one.name for one in own}
    # torch's methods have no annotations; their amount is a count or a share.
    typed = (replace(one, annotation="int | float", type=COUNT_OR_SHARE) if one.type is Any else one for one in own)
    found = (other if one.name == "amount" else one for one, other in zip(own, typed, strict=True))
    return (*found, *(one for one in read_parameters(PRUNING, "Timing") if one.name not in names))


def check_parameters(entry: Entry, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the parameters as the plugin takes them, and for each mistake its parameter and what is wrong."""
    clean, mistakes = check_values(parameters(entry), given)
    if entry.origin == "torchvision":
        from robustkit.models.torchvision_signatures import WEIGHTS

        mistakes = [(name, WEIGHTS if name == "weights" else what) for name, what in mistakes]
    if (
        clean.get("schedule", "one_shot") != "one_shot"
        and is_torch_pruning(entry)
        and not _is_share(clean.get("amount"))
    ):
        mistakes.append(
            ("schedule", f"{clean['schedule']}: {entry.name} needs an `amount` that is a share in [0, 1], e.g. 50%")
        )
    return clean, mistakes


def _is_share(amount: object) -> bool:
    return isinstance(amount, float) and 0 <= amount <= 1


def declared_norms(entry: Entry) -> tuple[str, ...]:
    """Return the norms that a user's attack or defense says it works under (`norms = ("linf", "l2")`); () for any."""
    if entry.origin == "registered":
        found = getattr(_registered.objects[entry.kind, entry.name], "norms", ())
    else:
        found = literal_of(entry.file, entry.attribute, "norms") if entry.file else ()
    given = found if isinstance(found, tuple | list) else ()
    return tuple(one for one in given if isinstance(one, str))


def is_torch_pruning(entry: Entry) -> bool:
    """Say whether a plugin is a pruning method for torch.nn.utils.prune, torch's own or a user's."""
    if entry.kind != "compressor" or entry.origin == "builtin":
        return False
    if entry.origin == "registered":
        made = _registered.objects[entry.kind, entry.name]
        return any(one.__module__ == "torch.nn.utils.prune" for one in getattr(made, "__mro__", ()))
    return entry.file is not None and is_pruning_method(entry.file, entry.attribute)


def load(entry: Entry) -> Any:  # noqa: ANN401
    """Import and return the class or function of a plugin.

    Raises:
        UsageError: its module cannot be imported, or has no such attribute.
    """
    if entry.origin == "registered":
        return _registered.objects[entry.kind, entry.name]
    where, _, attribute = entry.target.rpartition(":")
    try:
        if entry.origin.startswith("file"):
            assert entry.file is not None
            module = import_file(entry.file)
        elif entry.origin == "torchvision":
            module = importlib.import_module("torchvision.models")
        else:
            module = importlib.import_module(where)
        return getattr(module, attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(f"{entry.kind} {entry.name!r} cannot be imported: {error}") from error


def create(entry: Entry, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Make the plugin with these parameters."""
    if entry.origin == "torchattacks":
        from robustkit.attacks.torchattacks import TorchAttack

        return TorchAttack(entry.attribute, dict(values))
    if is_torch_pruning(entry):
        from robustkit.compress.torch_methods import make_method

        return make_method(load(entry), values)
    return load(entry)(**values)


def torchattacks_files() -> dict[str, Path]:
    """Return the attack classes of the installed torchattacks and the file of each, without importing it."""
    root = package_folder("torchattacks")
    return _classes([*sorted((root / "attacks").glob("*.py")), *sorted((root / "wrappers").glob("*.py"))], "Attack")


def torchvision_files() -> dict[str, Path]:
    """Return the classification models of the installed torchvision and the file of each, without importing it."""
    folder = package_folder("torchvision") / "models"
    return _builders(sorted(folder.glob("*.py")))


def _classes(files: Iterable[Path], base: str) -> dict[str, Path]:
    return {name: file for file in files for name in classes_of(file, base)}


def _builders(files: Iterable[Path]) -> dict[str, Path]:
    return {name: file for file in files for name in functions_of(file, "register_model")}


def _entry_points(kind: Kind) -> dict[str, str]:
    group = ENTRY_POINTS.get(kind)
    return {point.name: point.value for point in importlib.metadata.entry_points(group=group)} if group else {}


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
