"""Where in a recipe's document a thing stands that its specification has lost sight of. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Use


def written(reader: Reader, label: str) -> str:
    """Return the label as it stands in the file, where a matrix made many of it."""
    labels = at(reader, ("variants",))
    if not isinstance(labels, dict) or label in labels:
        return label
    for label_written in labels:
        plain = re.split(r"\$\{\w+\}|\$\w+", label_written)
        if len(plain) > 1 and re.fullmatch(".+".join(map(re.escape, plain)), label):
            return str(label_written)
    return label


def position(reader: Reader, path: PathTuple, use: Use) -> PathTuple:
    """Return where in a list of uses one stands; () where there is no list, or where a matrix wrote its name."""
    items = at(reader, path)
    for number, item in enumerate(items if isinstance(items, list) else []):
        name, given = next(iter(item.items()), ("", None)) if isinstance(item, dict) else (item, None)
        if name == use.name and use.label == (given.get("as", name) if isinstance(given, dict) else name):
            return (number,)
    return ()


def at(reader: Reader, path: PathTuple) -> Any:  # noqa: ANN401
    """Return what stands at a path of keys; None where there is nothing."""
    place = reader.document.data
    for step in path:
        place = place.get(step) if isinstance(place, dict) else None
    return place
