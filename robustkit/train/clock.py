"""When a training will end, from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

MEASURED = 20
"""Steps after which the end is projected; the first one, which warms up, is left out."""


class Clock:
    """Projects a training's time once, after its first steps in this process.

    limit: seconds that the training may take, or None; done: seconds that it took before it was resumed. `tick`
    returns what to warn of where the projection is beyond the limit.
    """

    def __init__(
        self,
        limit: float | None,
        done: float,
        on_event: Callable[[str, Mapping[str, Any]], None],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limit, self._done, self._on_event, self._now = limit, done, on_event, now
        self._count = 0
        self._begun = 0.0

    def tick(self, left: int, wait: Callable[[], object]) -> str | None:
        """Count a step, with `left` more to come; `wait` waits for the device, which is done twice."""
        self._count += 1
        if self._count in (1, MEASURED):
            wait()
        if self._count == 1:
            self._begun = self._now()
        if self._count != MEASURED:
            return None
        each = (self._now() - self._begun) / (MEASURED - 1)
        seconds = self._done + each * (MEASURED + left)
        self._on_event("projection", {"seconds": round(seconds, 1), "limit": self._limit})
        if self._limit is None or seconds <= self._limit:
            return None
        return f"training is projected to take {seconds:,.0f} s, and train.time_limit is {self._limit:,.0f} s"
