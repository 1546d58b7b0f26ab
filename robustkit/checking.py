"""Values from a recipe against the types of a plugin's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from robustkit.errors import did_you_mean
from robustkit.signatures import Parameter

NO_LIST = ("Input should be a valid list", "Input should be a valid tuple")
LIST = "a list is needed; put it in brackets"


def check_values(
    known: tuple[Parameter, ...], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the checked values, and for each mistake the parameter's name and what is wrong with it."""
    by_name = {parameter.name: parameter for parameter in known}
    clean: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for name, value in given.items():
        if name not in by_name:
            problems.append((name, _unknown(name, by_name)))
            continue
        try:
            clean[name] = _adapter(by_name[name].type).validate_python(value)
        except ValidationError as error:
            problems.append((name, f"{name}: {explain(error)}"))
    for parameter in known:
        if parameter.required and parameter.name not in given:
            problems.append((parameter.name, f"{parameter.name} is missing ({parameter.annotation})"))
    return clean, problems


def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))


def explain(error: ValidationError) -> str:
    """Return what is wrong in one line, for a person."""
    return explain_details([(one["msg"], one.get("input")) for one in error.errors()])


def explain_details(details: Sequence[tuple[str, object]]) -> str:
    """Return pydantic's (message, input) pairs as one line, for a person."""
    messages = []
    for message, _ in details:
        text = LIST if message in NO_LIST else message.removeprefix("Value error, ")
        if text not in messages:
            messages.append(text[:1].lower() + text[1:])
    shown = details[0][1]
    got = "" if "'" in messages[0] or isinstance(shown, dict) else f", not {shown!r}"
    message, separator, hint = " or ".join(messages).partition("; ")
    return f"{message}{got}{separator}{hint}"


def _unknown(name: str, known: Mapping[str, Parameter]) -> str:
    hint = did_you_mean(name, known)
    takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
    return f"unknown parameter {name!r}; {hint or takes}"
