"""How long models take: runs of all of them in turn, so that a machine that drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.results import Latency

WARMUP = 3


@dataclass(frozen=True)
class Effort:
    """How many runs a figure is of: `seconds` worth of them, at least `least` and at most `most`, if `cap` allows.

    `cap` is in seconds a model; with slower models there are fewer runs, and never fewer than `capped`.
    """

    least: int
    most: int
    seconds: float
    cap: float
    capped: int = 5

    def runs(self, slowest: float) -> int:
        """Return how many runs a model gets where the slowest takes so many milliseconds."""
        each = max(slowest, 1e-6) / 1e3
        wished = min(self.most, max(self.least, int(self.seconds / each)))
        return min(wished, max(self.capped, int(self.cap / each)))


QUICK = Effort(least=5, most=50, seconds=0.5, cap=0.5)
THOROUGH = Effort(least=50, most=200, seconds=1.0, cap=15.0)
"""At least 50 runs, but for batches of which 50 would take longer than 15 seconds a model."""


def measure_latency(
    models: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    batch_sizes: Sequence[int] = (1, 256),
    runs: int = 50,
) -> dict[str, dict[str, Latency]]:
    """Return {model: {"batch_1": ..., "batch_256": ...}} in milliseconds a batch, eager, the models in turn.

    At least 5 runs, at most `runs`, within about half a second a model and batch size; `Latency.runs` says how many
    there were.
    """
    found: dict[str, dict[str, Latency]] = {name: {} for name in models}
    effort = Effort(least=QUICK.least, most=runs, seconds=QUICK.seconds, cap=QUICK.cap)
    for batch in batch_sizes:
        x = torch.zeros(batch, *shape, device=device)
        timers = {name: timer(model.eval(), x) for name, model in models.items()}
        for name, value in in_turns(timers, effort).items():
            found[name][f"batch_{batch}"] = value
    return found


def in_turns(timers: Mapping[str, Callable[[], float]], effort: Effort) -> dict[str, Latency]:
    """Return what each timer says over the runs: one of each in turn, after three to warm up. Timers return ms."""
    first = {}
    for name, one in timers.items():
        for _ in range(WARMUP):
            first[name] = one()
    count = effort.runs(max(first.values(), default=0.0))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(count):
        for name, one in timers.items():
            times[name].append(one())
    return {name: summary(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> Latency:
    """Return median, quartiles and 95th percentile of times in milliseconds."""
    q1, median, q3, p95 = np.percentile(values, [25, 50, 75, 95]).tolist()
    return Latency(median=median, q1=q1, q3=q3, p95=p95, runs=len(values))


def timer(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], float]:
    """Return what runs once on x (N, C, H, W) and says how many milliseconds that took; on CUDA by its events."""

    def on_cpu() -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            run(x)
            return (time.perf_counter() - started) * 1e3

    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.inference_mode():
            start.record()
            run(x)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return on_cuda if x.device.type == "cuda" else on_cpu
