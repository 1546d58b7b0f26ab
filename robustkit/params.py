"""Constrained parameter types that plugins annotate their parameters with, and numbers as recipes write them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

_PLAIN = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_DURATION = re.compile(r"(?:(\d+\.?\d*)h)?\s*(?:(\d+\.?\d*)m)?\s*(?:(\d+\.?\d*)s)?")
_SIZE = re.compile(r"(\d+\.?\d*)\s*([kKmMgG]?)[bB]?")
_NUMBER = re.compile(rf"({_PLAIN})(?:\s*/\s*({_PLAIN}))?\s*(%)?")


def parse_number(text: str) -> float | None:
    """Return the number that `8/255`, `80%` or `1e-3` stands for; None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    above, below, percent = match.groups()
    divisor = float(below) if below else 1.0
    if divisor == 0:
        return None
    return float(above) / divisor / (100 if percent else 1)


def _to_number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not yes or no")
    if isinstance(value, str):
        number = parse_number(value)
        if number is None:
            raise ValueError(f"{value!r} is not a number; write it as 0.1, 8/255, 80% or 1e-3")
        return number
    return value


def _to_integer(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a whole number is needed, not yes or no")
    return value


def _fraction_hint(value: object) -> object:
    number = _to_number(value)
    if isinstance(number, int | float) and number > 1:
        # 80 is a share in percent; 1.2, 3 or 120% are mistakes of another kind.
        percent = 5 <= number <= 100 and not (isinstance(value, str) and "%" in value)
        hint = f"; did you mean {number:g}% or {number / 100:g}?" if percent else ""
        raise ValueError(f"a share in [0, 1] is needed{hint}")
    return number


def _eps_hint(value: object) -> object:
    number = _to_number(value)
    if isinstance(number, int | float) and number > 1 and float(number).is_integer():
        raise ValueError(f"eps is in [0, 1] pixel units; did you mean {number:g}/255?")
    return number


def parse_duration(text: str) -> float | None:
    """Return the seconds that `25m`, `1h30m` or `90s` stand for; None for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    return sum(float(value) * unit for value, unit in zip(match.groups(), (3600, 60, 1), strict=True) if value)


def _to_seconds(value: object) -> object:
    found = parse_duration(value) if isinstance(value, str) else None
    if found is not None:
        return found
    if isinstance(value, str) and parse_number(value) is None:
        raise ValueError(f"{value!r} is not a duration; write seconds, or 25m, 1h30m, 90s")
    return _to_number(value)


def _to_bytes(value: object) -> object:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{value!r} is not a size; write it as 500000, 500kB or 1.5MB")
        return round(float(match.group(1)) * 1000 ** " kmg".index(match.group(2).lower() or " "))
    return _to_integer(value)


Number = Annotated[float, BeforeValidator(_to_number), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_to_integer), Field(strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_fraction_hint)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), BeforeValidator(_fraction_hint)]
Eps = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_eps_hint)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_to_number)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_to_number)]
PositiveInt = Annotated[int, Field(gt=0, strict=True), BeforeValidator(_to_integer)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True), BeforeValidator(_to_integer)]
Duration = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_to_seconds)]
Magnitude = Annotated[int, Field(ge=0, le=30, strict=True), BeforeValidator(_to_integer)]
"""How strong RandAugment's operations are, on its scale of 31 levels."""
Bits = Annotated[int, Field(ge=1, le=8, strict=True), BeforeValidator(_to_integer)]
"""How many bits a channel of an image has."""
Quality = Annotated[int, Field(ge=1, le=100, strict=True), BeforeValidator(_to_integer)]
"""Of a JPEG file: 1 (small) to 100 (exact)."""
Bytes = Annotated[int, Field(gt=0), BeforeValidator(_to_bytes)]
Labels = Annotated[list[str], Field(min_length=1)]
"""Names of variants, one or more."""
PathStr = Annotated[str, Field(min_length=1)]
Schedule = Literal["one_shot", "cubic", "iterative"]
"""How a pruning method reaches its sparsity: at once, along Zhu and Gupta's cubic schedule, or in equal steps."""
