"""Trainings that run in turns, an epoch each, so that all of them meet the same machine: who reaches a target first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Measure = Callable[[nn.Module], float]
"""A model's accuracy as a share of 1; it leaves the model as it was."""


@dataclass
class Watch:
    """Wall clock and processor seconds while it runs."""

    seconds: float = 0.0
    cpu: float = 0.0
    _begun: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._begun = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Pause."""
        assert self._begun is not None
        self.seconds += time.perf_counter() - self._begun[0]
        self.cpu += time.process_time() - self._begun[1]
        self._begun = None


@dataclass
class Side:
    """One training: its model, its clock, and (seconds, CPU seconds, accuracy) after each epoch."""

    name: str
    model: nn.Module
    watch: Watch = field(default_factory=Watch)
    found: list[tuple[float, float, float]] = field(default_factory=list)

    def note(self, measure: Measure) -> None:
        """Measure the model, outside the clock."""
        accuracy = measure(self.model)
        self.found.append((self.watch.seconds, self.watch.cpu, accuracy))
        print(
            f"{self.name}: epoch {len(self.found)}, {self.watch.seconds:.1f} s ({self.watch.cpu:.1f} CPU s), "
            f"{100 * accuracy:.1f} %",
            flush=True,
        )

    def reached(self, target: float) -> tuple[float, float] | None:
        """Return (seconds, CPU seconds) at which the target was first met, or None."""
        return next(((seconds, cpu) for seconds, cpu, accuracy in self.found if accuracy >= target), None)

    @property
    def last(self) -> float:
        """The accuracy after the last epoch."""
        return self.found[-1][2]


@dataclass
class Rival(Side):
    """A training that does an epoch when it is told to."""

    epoch: Callable[[], None] = lambda: None
    epochs: int | None = None
    """Its whole training; None: until the target is met or its clock runs out."""

    def over(self, target: float | None, limit: float | None) -> bool:
        """Say whether it has nothing left to do: it ended, met the target, or passed the limit of seconds."""
        if self.epochs is not None:
            return len(self.found) >= self.epochs
        met = target is not None and self.reached(target) is not None
        return met or (limit is not None and self.watch.seconds > limit)

    def turn(self, measure: Measure) -> None:
        """Do an epoch on the clock, and measure."""
        self.watch.start()
        self.epoch()
        self.watch.stop()
        self.note(measure)


def race(
    ours: Side,
    train: Callable[[Callable[[str, Mapping[str, Any]], None]], object],
    rivals: list[Rival],
    measure: Measure,
    *,
    target: float | None,
    give_up: float,
) -> None:
    """Run `train`, whose events say when an epoch ends, and the rivals' epochs in between and afterwards.

    A rival without a number of epochs ends when its clock passes `give_up` times what ours needed for the target.
    """

    def limit() -> float | None:
        met = ours.reached(target) if target is not None else None
        return None if met is None else give_up * met[0]

    def listen(event: str, _: Mapping[str, Any]) -> None:
        if event != "epoch":
            return
        ours.watch.stop()
        ours.note(measure)
        for rival in rivals:
            if not rival.over(target, limit()):
                rival.turn(measure)
        ours.watch.start()

    ours.watch.start()
    train(listen)
    ours.watch.stop()
    for rival in rivals:
        while not rival.over(target, limit() if limit() is not None else 0.0):
            rival.turn(measure)


def table(ours: Side, rivals: list[Side], target: float) -> None:
    """Print when each side met the target, and how many times longer than ours it took."""
    mine = ours.reached(target)
    print(f"\n| training | epochs | s | CPU s | last accuracy | to {100 * target:.1f} %: s / ours | CPU s / ours |")
    print("|---|---|---|---|---|---|---|")
    for side in (ours, *rivals):
        met = side.reached(target)
        seconds, cpu = met or (side.watch.seconds, side.watch.cpu)
        bound = "" if met else "> "
        number = next((n for n, one in enumerate(side.found, 1) if one[2] >= target), len(side.found))
        ratios = [f"{bound}{a / b:.1f}" for a, b in zip((seconds, cpu), mine, strict=True)] if mine else ["", ""]
        print(
            f"| {side.name} | {bound}{number} | {bound}{seconds:.0f} | {bound}{cpu:.0f} | {100 * side.last:.1f} | "
            f"{ratios[0]} | {ratios[1]} |"
        )
    if mine is None:
        print(f"{ours.name} did not reach {100 * target:.1f} %")
