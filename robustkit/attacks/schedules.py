"""How much the cascade spends on each of its stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BudgetName = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class Schedule:
    """How much of each stage. Steps count forwards and backwards an example that is still attacked.

    `close`: an example is attacked further only while what is left of its margin is less than this times what the
    attack has taken off it already. Examples are judged each by itself, so that their company changes nothing.
    """

    probe: int = 8
    direction: int = 8
    targets: int = 9
    target_steps: int = 10
    sure_targets: int = 3
    """So many of the likeliest targets are tried on every example, the others on those that are close."""
    target_close: float = 1.0
    refine_targets: int = 3
    refine_steps: int = 20
    refine_close: float = 0.5
    restarts: int = 3
    """Rounds of a climb towards each of the refined targets."""
    restart_steps: int = 40
    restart_close: float = 0.15
    polish: int = 600
    polish_close: float = 0.03
    queries: int = 100


SCHEDULES: dict[BudgetName, Schedule] = {
    "quick": Schedule(targets=3, refine_targets=1, restarts=1, polish=0, queries=0),
    "standard": Schedule(),
    "thorough": Schedule(
        target_steps=25,
        target_close=math.inf,
        refine_targets=5,
        refine_steps=50,
        refine_close=math.inf,
        restarts=4,
        restart_steps=100,
        restart_close=1.0,
        polish=1000,
        polish_close=1.0,
        queries=2500,
    ),
}
