"""CPU seconds of several things in turns: what else a machine does only makes one slower, so the quickest counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

CLOSE = 0.01
"""Two times are the same to so large a share."""


def quickest(
    runs: Mapping[str, Callable[[], object]], *, fewest: int, most: int, repeats: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return the CPU seconds of the quickest of each; repeats: calls at once, else one.

    Rounds go on, from `fewest` to `most`, until each one's two quickest are close: until then a quick one may have been
    luck, or may still be to come. What the times are good for has no say in it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1, most + 1):
        for name, run in runs.items():
            calls = (repeats or {}).get(name, 1)
            begun = time.process_time()
            for _ in range(calls):
                run()
            times[name] = sorted([*times[name], (time.process_time() - begun) / calls])
        if number >= max(2, fewest) and all(second <= (1 + CLOSE) * first for first, second, *_ in times.values()):
            break
    return {name: found[0] for name, found in times.items()}
