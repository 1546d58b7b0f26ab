"""The race between trainings: epochs in turns, clocks that stand while another side or a measurement runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import racing
from racing import Rival, Side, race, table
from torch import nn


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(racing, "time", made)
    return made


def run(clock: Time, *, ours: list[float], theirs: list[float], give_up: float, epochs: int | None = None) -> Any:
    """A race to 0.7 of sides with these accuracies; an epoch of ours takes 2 s, of theirs 3, a measurement 100."""
    log: list[str] = []
    mine, other = Side("ours", nn.Identity()), Rival("theirs", nn.Identity(), epochs=epochs)

    def measure(model: nn.Module) -> float:
        clock.now += 100
        side, accuracies = (mine, ours) if model is mine.model else (other, theirs)
        log.append(side.name)
        return accuracies[min(len(side.found), len(accuracies) - 1)]

    def epoch() -> None:
        clock.now += 3

    other.epoch = epoch

    def train(listen: Any) -> None:
        for _ in ours:
            clock.now += 2
            listen("step", {})
            listen("epoch", {})

    race(mine, train, [other], measure, target=0.7, give_up=give_up)
    return mine, other, log


def test_the_sides_take_turns_and_a_clock_counts_its_own_epochs_alone(clock: Time) -> None:
    mine, other, log = run(clock, ours=[0.5, 0.8], theirs=[0.1, 0.2, 0.6, 0.75, 0.9], give_up=10)
    assert log == ["ours", "theirs", "ours", "theirs", "theirs", "theirs"]
    assert [seconds for seconds, _, _ in mine.found] == [2, 4]
    assert [(seconds, cpu) for seconds, cpu, _ in other.found] == [(3, 1.5), (6, 3), (9, 4.5), (12, 6)]
    assert mine.reached(0.7) == (4, 2)
    assert other.reached(0.7) == (12, 6)


def test_a_rival_that_takes_too_long_is_stopped_and_its_ratio_is_a_bound(
    clock: Time, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other, _ = run(clock, ours=[0.5, 0.8], theirs=[0.1], give_up=2.5)
    assert [seconds for seconds, _, _ in other.found] == [3, 6, 9, 12]  # the first beyond 2.5 * 4
    assert other.reached(0.7) is None
    capsys.readouterr()
    table(mine, [other], 0.7)
    text = capsys.readouterr().out
    assert "| ours | 2 | 4 | 2 | 80.0 | 1.0 | 1.0 |" in text
    assert "| theirs | > 4 | > 12 | > 6 | 10.0 | > 3.0 | > 3.0 |" in text


def test_a_rival_with_a_whole_training_does_all_of_it(clock: Time) -> None:
    _, other, _ = run(clock, ours=[0.8], theirs=[0.9], give_up=1, epochs=3)
    assert len(other.found) == 3


def test_where_ours_never_gets_there_nobody_waits(clock: Time, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other, _ = run(clock, ours=[0.5, 0.6], theirs=[0.1], give_up=100)
    assert len(other.found) == 2
    table(mine, [other], 0.7)
    assert "ours did not reach 70.0 %" in capsys.readouterr().out
    assert math.isclose(mine.last, 0.6)
