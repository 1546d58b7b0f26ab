"""`data: {<source>: {...}, poison: {...}}`: what is planted in the training data of a recipe."""

from __future__ import annotations

from typing import Any

from robustkit import registry
from robustkit.recipe.facts import KNOWN
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Use

KEY = "poison"
PATH = ("data", KEY)
CLASSES = ("target", "source")
PATCHED = ("badnets", "clean_label")


def split_poison(data: object) -> tuple[object, object]:
    """Return the source and the poison that stand in `data:`, each as it is written; None where it is not there."""
    if not isinstance(data, dict) or KEY not in data:
        return data, None
    rest = {name: given for name, given in data.items() if name != KEY}
    return rest or None, data[KEY]


def read_poison(reader: Reader, value: object, data: Use | None) -> Use | None:
    """Return the poison that `data: {poison: ...}` names; None where it is not there, or wrong and noted."""
    if value is None:
        return None
    use = reader.use("poison", PATH, value)
    if use is None:
        return None
    where = (*PATH, use.name) if isinstance(value, dict) else PATH
    if use.parameters.get("source") is not None and use.parameters["source"] == _value(reader, use, "target"):
        reader.problem(
            (*where, "source"), f"source and target are both {use.parameters['source']}", "nothing is flipped"
        )
    facts = KNOWN.get(data.name) if data else None
    if data is None or facts is None:
        return use
    for name in CLASSES:
        number = use.parameters.get(name)
        if isinstance(number, int) and number >= facts.classes:
            message = f"{name} is class {number}; {data.name} has the classes 0 to {facts.classes - 1}"
            reader.problem((*where, name), message)
    side = data.parameters.get("size") or facts.side
    size = _value(reader, use, "size") if use.name in PATCHED else 0
    if isinstance(size, int) and size > side:
        reader.problem((*where, "size"), f"a patch of {size} pixels on images of {side}x{side}", f"at most {side}")
    return use


def _value(reader: Reader, use: Use, name: str) -> Any:  # noqa: ANN401
    """Return a parameter of the poison as it is given, else its default."""
    if name in use.parameters:
        return use.parameters[name]
    entry = registry.find("poison", use.name, folder=reader.folder, plugins=reader.plugins)
    return next((one.default for one in registry.parameters(entry) if one.name == name), None)
