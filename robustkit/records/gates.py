"""What a run was held to, and what failed in it."""

from __future__ import annotations

from typing import Literal

from robustkit.records.fields import Count, Measured, Name, Record, Text

GateVerdict = Literal["holds", "holds (within noise)", "fails (within noise)", "fails"]


class GateResult(Record):
    """One gate: what was asked, the two sides as measured, and the verdict."""

    text: Text
    left: Measured
    right: Measured
    verdict: GateVerdict
    confident: bool = False
    every_seed: bool = False
    """Judged under each seed alone; the sides are those of the seed that speaks most against it."""

    @property
    def holds(self) -> bool:
        """Whether the run passes this gate."""
        return self.verdict == "holds" or (not self.confident and self.verdict == "holds (within noise)")


class StepFailure(Record):
    """A step that failed: of which variant (none for the latency of all) and seed, what it did, and why."""

    variant: Name = ""
    seed: Count = 0
    step: Name
    message: Text
