"""What poisoned training data did, and what was done about them."""

from __future__ import annotations

from pydantic import Field

from robustkit.records.accuracy import Rate
from robustkit.records.fields import Count, Name, Record, Share


class Filtered(Record):
    """What one data defense removed from poisoned training data, against what was poisoned."""

    defense: Name
    removed: Count
    poisoned: Count
    """Poisoned examples before it."""
    hits: Count
    """Poisoned examples among the removed."""
    precision: Share | None
    """hits / removed; none where nothing was removed."""
    recall: Share | None
    """hits / poisoned; none where nothing was poisoned."""


class Poisoning(Record):
    """What poisoned training data did: the attack success rate, and what the variant's own defenses removed."""

    success: Rate
    """Share of the triggered test images, without those of the target, that are taken for the target."""
    poisoned: Count | None = None
    """Poisoned examples in the training split; none for a variant that was not trained."""
    left: Count | None = None
    """Poisoned examples that it was trained on."""
    filters: list[Filtered] = Field(default_factory=list)


class Tolerance(Record):
    """Accuracy of a vote that is certain whatever so many poisons do: an example each, added, removed or relabelled."""

    members: Count
    poisons: list[Count]
    accuracy: list[Rate]
    """At each number of poisons: the share of test images that are right and stay so."""
