"""The variants that answer beside another one: who they are, and what they cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.recipe.document import PathTuple
from robustkit.recipe.order import Draft
from robustkit.recipe.owners import defined_hooks
from robustkit.recipe.quantized import is_file
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Use, VariantSpec

HOOK = "take_members"
"""What a wrapper overrides that other variants answer beside."""
KEY = "members"


def named_members(reader: Reader, path: PathTuple, given: Mapping[str, Any]) -> tuple[tuple[str, PathTuple], ...]:
    """Return the labels that the defenses of a variant name as members, and where, before anything is checked."""
    written = given.get("defenses")
    items = list(enumerate(written)) if isinstance(written, list) else [(None, written)]
    found: list[tuple[str, PathTuple]] = []
    for number, item in items:
        name, values = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (None, None)
        if not isinstance(name, str) or not isinstance(values, dict) or not isinstance(values.get(KEY), list):
            continue
        if HOOK not in defined_hooks(reader, Use(name=name, label=name)):
            continue
        here: PathTuple = (*path, "defenses", *(() if number is None else (number,)), name, KEY)
        found += [(label, (*here, place)) for place, label in enumerate(values[KEY]) if isinstance(label, str)]
    return tuple(found)


def members_of(
    reader: Reader,
    draft: Draft,
    parent: VariantSpec | None,
    wrappers: Sequence[Use],
    changed: bool,
    done: Mapping[str, VariantSpec],
) -> dict[str, tuple[str, ...]]:
    """Return the labels of the members by the label of each wrapper that takes some.

    A member named twice is a problem, and so are a parent whose weights the variant still has, which would answer
    twice, and an ONNX file. `changed`: whether the variant is trained or compressed. `done`: the variants before it.
    """
    seen: set[str] = set()
    for label, path in draft.members:
        if label in seen:
            reader.problem(path, f"{label!r} is named twice: it would count twice", "name each variant once")
        elif parent is not None and not changed and label == draft.parent:
            message = f"{draft.label!r} has the weights of {label!r} already: it would answer twice"
            reader.problem(path, message, "name other variants only; it answers itself as well")
        elif label in done and is_file(done[label]):
            message = f"{label!r} is an ONNX file: it cannot be part of another variant's file"
            reader.problem(path, message, "name the variant that it was made of")
        seen.add(label)
    joined = [use for use in wrappers if HOOK in defined_hooks(reader, use)]
    return {use.label: tuple(use.parameters.get(KEY, ())) for use in joined}
