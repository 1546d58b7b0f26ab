"""Reads plain values into checked ones and collects every problem on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from robustkit import registry
from robustkit.checking import explain_details
from robustkit.errors import Problem, UsageError, did_you_mean
from robustkit.recipe.document import Document, PathTuple
from robustkit.recipe.limits import beyond_limits, refusal
from robustkit.recipe.spec import Use

PLACES: dict[registry.Kind, str] = {
    "defense": "defenses:",
    "compressor": "compress:",
    "attack": "evaluate.attacks:",
    "certificate": "evaluate.certify:",
    "augmentation": "train.augment:",
    "optimizer": "train.optimizer:",
    "schedule": "train.schedule:",
    "poison": "data.poison:",
    "data": "data:",
    "model": "model:",
}
"""Where each kind of plugin stands in a recipe."""
Model = TypeVar("Model", bound=BaseModel)


class Reader:
    """One pass over a document: every read returns a value, or None after noting a problem."""

    def __init__(self, document: Document, folder: Path | None, plugins: tuple[Path, ...] = ()) -> None:
        self.document = document
        self.folder = folder
        self.plugins = plugins
        self.problems: list[Problem] = []
        self.labels: tuple[str, ...] = ()
        """Labels of the variants, once they are read."""

    def problem(self, path: PathTuple, message: str, hint: str | None = None, *, key: bool = False) -> None:
        """Note a problem at a path; `key`: at its key rather than at its value."""
        found = Problem(message, self.document.mark(path, key=key), hint)
        if found not in self.problems:
            self.problems.append(found)

    def mapping(self, path: PathTuple, value: object, known: Collection[str]) -> dict[str, Any]:
        """Return a mapping whose keys are all known; None counts as empty."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(path, f"a mapping belongs here, not {_kind(value)}", f"keys: {', '.join(known)}")
            return {}
        for key in value:
            if key not in known:
                hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
                self.problem((*path, key), f"unknown key {key!r}", hint, key=True)
        return {key: item for key, item in value.items() if key in known}

    def model(self, kind: type[Model], path: PathTuple, value: Mapping[str, Any]) -> Model | None:
        """Return a pydantic model of a mapping."""
        try:
            return kind.model_validate(dict(value))
        except ValidationError as error:
            for one in error.errors():
                where = tuple(part for part in one["loc"] if isinstance(part, str | int))
                text = explain_details([(one["msg"], one.get("input"))])
                self.problem((*path, *where), f"{'.'.join(map(str, where))}: {text}" if where else text)
            return None

    def use(self, kind: registry.Kind, path: PathTuple, value: object) -> Use | None:
        """Return one use of a plugin, written as `name` or `{name: {parameters}}`."""
        name: str
        given: Any
        if isinstance(value, str):
            name, given = value, {}
        elif isinstance(value, dict) and len(value) == 1:
            name, given = next(iter(value.items()))
            path = (*path, name)
            if given is None:
                given = {}
            if not isinstance(given, dict):
                self.problem(path, f"the parameters of {name} are a mapping, e.g. {{{name}: {{key: value}}}}")
                return None
        else:
            hint = "put each into its own list item" if isinstance(value, dict) and len(value) > 1 else None
            self.problem(path, f"a {kind} is written as name or {{name: {{parameters}}}}", hint)
            return None
        return self._checked(kind, path, name, dict(given))

    def _checked(self, kind: registry.Kind, path: PathTuple, name: str, given: dict[str, Any]) -> Use | None:
        default = _label(kind, name)
        label = given.pop("as", default)
        if not isinstance(label, str) or not label.strip():
            self.problem((*path, "as"), "`as` is a name for this use")
            label = default
        try:
            entry = registry.find(kind, name, folder=self.folder, plugins=self.plugins)
            refused = refusal(entry)
            if refused is not None:
                raise UsageError(refused)
            clean, mistakes = registry.check_parameters(entry, given)
        except UsageError as error:
            message, _, hint = _elsewhere(kind, name) or str(error).partition("; ")
            self.problem(path, message, hint or None, key=path[-1] == name)
            return None
        for parameter, message in [*mistakes, *beyond_limits(entry, clean)]:
            text, _, hint = message.partition("; ")
            unknown = text.startswith("unknown")
            self.problem((*path, parameter), f"{name}: {text}" if unknown else text, hint or None, key=unknown)
        return Use(name=name, parameters=clean, label=label)

    def uses(self, kind: registry.Kind, path: PathTuple, value: object) -> tuple[Use, ...]:
        """Return a list of uses with different labels; one use may stand without a list."""
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        found: list[Use] = []
        for number, item in enumerate(items):
            here = (*path, number) if isinstance(value, list) else path
            use = self.use(kind, here, item)
            if use is None:
                continue
            if any(use.label == other.label for other in found):
                hint = f"give the second its own label: {{{use.name}: {{as: other-name}}}}"
                self.problem(here, f"two uses with the label {use.label!r}", hint)
            found.append(use)
        return tuple(found)


def _label(kind: registry.Kind, name: str) -> str:
    """Return what a use is called without `as`: labels of attacks and certificates stand where no path fits."""
    return name.rpartition(":")[2] if kind in ("attack", "certificate") else name


def _elsewhere(kind: registry.Kind, name: str) -> tuple[str, str, str] | None:
    """Return what is wrong with a plugin of another kind, and where it belongs; None where the name is of none."""
    if name in registry.names(kind):
        return None
    other = next((one for one in PLACES if name in registry.names(one)), None)
    if other is None:
        return None
    similar = did_you_mean(name, registry.names(kind))
    hint = f"put it under `{PLACES[other]}`" + (f", or {similar}" if similar else "")
    return f"{name} is {'an' if other[0] in 'ao' else 'a'} {other}, no {kind}", "; ", hint


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    return repr(value) if value is not None else "nothing"
