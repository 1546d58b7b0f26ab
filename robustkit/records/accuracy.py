"""What is known of a model without an adversary, or of two models on the same examples."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from robustkit.records.fields import Count, Difference, Name, Record, Share, Text

Severity = Literal["wrong", "doubt", "note"]


class Rate(Record):
    """An accuracy as a fraction of 1, with its 95 % Clopper-Pearson interval over n examples."""

    value: Share
    low: Share
    high: Share
    n: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("an accuracy lies outside of its own interval")
        return self


class Paired(Record):
    """Difference to the parent on the same examples, in fractions of 1, with the exact McNemar p-value."""

    difference: Difference
    low: Difference
    high: Difference
    p: Share
    lost: Count
    gained: Count


class Corruptions(Record):
    """Accuracy under common corruptions: the mean of all, and severities 1 to 5 by corruption."""

    mean: Rate
    by: dict[Name, list[Share]] = Field(default_factory=dict)


class Flag(Record):
    """A doubt about a figure: `wrong` (must not be quoted), `doubt`, or `note`; the message says what to do next."""

    id: Name
    severity: Severity
    message: Text
