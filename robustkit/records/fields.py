"""The types of fields in results.json: what may stand in a file that somebody else wrote."""

from __future__ import annotations

import math
import unicodedata
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(value: object, keep: str = "\t\n") -> object:
    """Return a text without what would steer a terminal or turn the direction of writing; anything else as it is."""
    if not isinstance(value, str):
        return value
    return "".join(
        letter
        for letter in value
        if letter in keep or (unicodedata.category(letter) not in ("Cc", "Cs") and letter not in BIDI)
    )


def one_line(value: object) -> object:
    """Return a text without line breaks and tabs as well."""
    return printable(value, keep="")


def _number(value: object) -> object:
    # JSON has no NaN: what was not finite is written as null.
    return math.nan if value is None else value


LARGEST = 2**63 - 1
Name = Annotated[str, BeforeValidator(one_line)]
Text = Annotated[str, BeforeValidator(printable)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Loss = Annotated[float, Field(allow_inf_nan=True)]
Measured = Annotated[Loss, BeforeValidator(_number)]


class Record(BaseModel):
    """Base of the records: keys that a later version added are kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
