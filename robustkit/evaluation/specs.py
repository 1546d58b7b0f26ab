"""Attacks by name, with parameters, or as objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from robustkit import registry
from robustkit.attacks.threat import Attack
from robustkit.attacks.torchattacks import TorchAttack
from robustkit.errors import UsageError

AttackSpec = str | Mapping[str, Mapping[str, Any] | Attack | None] | Attack


def make_attacks(
    specs: Sequence[AttackSpec] | Mapping[str, Mapping[str, Any] | Attack | None],
) -> dict[str, tuple[str, Attack]]:
    """Return {label: (plugin name, attack)} for names, `{name: parameters}`, objects and `{label: object}`."""
    items: Iterable[AttackSpec] = (
        [{name: values} for name, values in specs.items()] if isinstance(specs, Mapping) else specs
    )
    if isinstance(specs, str):
        items = [specs]
    made: dict[str, tuple[str, Attack]] = {}
    for item in items:
        label, name, attack = _one(item)
        if label in made or label in ("clean", "worst"):
            raise UsageError(f"two attacks are called {label!r}; give one another label: {{{name!r}: {{'as': ...}}}}")
        made[label] = (name, attack)
    return made


def _one(item: AttackSpec) -> tuple[str, str, Attack]:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping):
        if not callable(item):
            raise UsageError(f"{item!r} is no attack: a name, {{name: parameters}} or a callable is needed")
        name = type(item).__name__.lower()
        kind = f"torchattacks.{item.name}" if isinstance(item, TorchAttack) else name
        return getattr(item, "label", None) or name, kind, item
    if len(item) != 1:
        raise UsageError("an attack is written {name: parameters}, one name each")
    name, given = next(iter(item.items()))
    if given is not None and not isinstance(given, Mapping):
        return (name, *_one(given)[1:])
    values = dict(given or {})
    label = str(values.pop("as", name))
    entry = registry.find("attack", name)
    clean, mistakes = registry.check_parameters(entry, values)
    if mistakes:
        raise UsageError(f"attack {name}: " + "; ".join(message for _, message in mistakes))
    return label, name, cast(Attack, registry.create(entry, clean))
