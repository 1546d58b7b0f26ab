"""Variants that a `matrix` spells out: every combination, with $names put in for their values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from robustkit.errors import did_you_mean

MAX_VARIANTS = 1_000
_NAME = re.compile(r"\$(\w+)|\$\{(\w+)\}")


class MatrixError(ValueError):
    """A matrix that cannot be expanded; the message says why."""


def names_in(text: str) -> list[str]:
    """Return the names that a text refers to by $name or ${name}."""
    return [first or second for first, second in _NAME.findall(text)]


def combinations(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of a matrix's values, the last name changing fastest.

    Raises:
        MatrixError: a name has no list of plain values, or there are too many combinations.
    """
    for name, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise MatrixError(f"matrix.{name} must be a list of at least one value")
        if any(isinstance(value, dict | list) or value is None for value in values):
            raise MatrixError(f"matrix.{name} must hold plain values")
    count = 1
    for values in matrix.values():
        count *= len(values)
    if count > MAX_VARIANTS:
        raise MatrixError(f"this matrix makes {count:,} variants; at most {MAX_VARIANTS:,} are allowed")
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def substitute(value: Any, names: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the value with each $name replaced; a text that is nothing but one $name becomes the value itself.

    Raises:
        MatrixError: a $name is not in the matrix.
    """
    if isinstance(value, dict):
        return {substitute_text(key, names): substitute(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, names) for item in value]
    if not isinstance(value, str):
        return value
    whole = _NAME.fullmatch(value)
    if whole is not None:
        return _lookup(whole.group(1) or whole.group(2), names)
    return substitute_text(value, names)


def substitute_text(text: str, names: Mapping[str, Any]) -> str:
    """Return the text with each $name replaced by its value."""
    return _NAME.sub(lambda match: str(_lookup(match.group(1) or match.group(2), names)), text)


def _lookup(name: str, names: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if name not in names:
        hint = did_you_mean(name, names)
        raise MatrixError(f"${name} is not in the matrix" + (f"; {hint}" if hint else ""))
    return names[name]
