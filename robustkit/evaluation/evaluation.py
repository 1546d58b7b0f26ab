"""What `robustkit.evaluate` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustkit.attacks.threat import Threat
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.outcome import Outcome
from robustkit.results import Audit, Flag, Rate


@dataclass(repr=False)
class Evaluation:
    """Accuracies with 95 % intervals, what each attack did, and the doubts about it."""

    clean: Rate
    worst: Rate
    """Share of examples that are right under every attack."""
    attacks: dict[str, Rate]
    outcomes: dict[str, Outcome]
    flags: list[Flag]
    threat: Threat
    correct: NDArray[np.bool_]
    """Per example: right under every attack."""
    distances: dict[str, MinimumDistances] = field(default_factory=dict)
    """Of the minimum-norm attacks: the smallest distance found of each example, whatever the threat's eps."""
    audit: Audit | None = None
    """AutoAttack on a random subset of what every attack left, where it was asked for."""
    quantized: bool = False
    """Whether adversarial images were rounded to 8 bits before they were judged."""

    def __repr__(self) -> str:
        rows = [("clean", self.clean), *self.attacks.items(), ("worst", self.worst)]
        width = max(len(name) for name, _ in rows)
        eps = "one eps an example" if isinstance(self.threat.eps, Tensor) else f"eps {self.threat.eps:.4g}"
        bits = ", adversarial images rounded to 8 bits" if self.quantized else ""
        lines = [f"accuracy of {self.clean.n} examples, {self.threat.norm} {eps}{bits}, 95 % intervals"]
        lines += [
            f"  {name:{width}}  {rate.value:7.2%}  [{rate.low:.2%}, {rate.high:.2%}]{self._cost(name)}"
            for name, rate in rows
        ]
        lines += [f"  {name:{width}}  {found!r}" for name, found in self.distances.items()]
        lines += [f"  {self.audit}"] if self.audit is not None else []
        lines += [f"{flag.severity} {flag.id}: {flag.message}" for flag in self.flags]
        return "\n".join(lines)

    def _cost(self, name: str) -> str:
        outcome = self.outcomes.get(name)
        if outcome is None:
            return ""
        return f"  {outcome.forwards:,} forwards, {outcome.backwards:,} backwards, {outcome.seconds:.1f} s"
