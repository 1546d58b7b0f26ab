"""What a model costs: parameters, non-zeros, bytes, MACs, latency. Measured, never derived from a sparsity."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustkit.compress.masks import prunable
from robustkit.models.quantized import Quantized
from robustkit.results import Latency, LayerSparsity

GZIP_LEVEL = 6
SECONDS_EACH = 0.5
WARMUP = 3
MIN_RUNS = 5


@dataclass(frozen=True)
class Costs:
    """Size and work of one model; `macs` are multiply-accumulates of convolutions and linear layers an image."""

    parameters: int
    nonzero: int
    bytes: int
    gzip_bytes: int
    macs: int
    sparsity: float
    layers: list[LayerSparsity]


def measure_costs(model: nn.Module, shape: tuple[int, int, int], artefact: Path) -> Costs:
    """Return the costs of a model whose file is `artefact`; sparsity is over convolution and linear weights."""
    raw = artefact.read_bytes()
    layers = [
        LayerSparsity(name=name, size=weight.numel(), zeros=int((weight == 0).sum()))
        for name, weight in (model.weights().items() if isinstance(model, Quantized) else prunable(model))
    ]
    total = sum(layer.size for layer in layers)
    parameters = list(model.parameters())
    return Costs(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int((parameter != 0).sum()) for parameter in parameters),
        bytes=len(raw),
        gzip_bytes=gzip_size(raw),
        macs=count_macs(model, shape),
        sparsity=sum(layer.zeros for layer in layers) / total if total else 0.0,
        layers=layers,
    )


def gzip_size(raw: bytes) -> int:
    """Return the bytes that a file's content takes after gzip."""
    return len(zlib.compress(raw, GZIP_LEVEL))


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of one image: half the operations that torch's counter counts."""
    counter = FlopCounterMode(display=False)
    device = next(model.parameters()).device
    with torch.no_grad(), counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops()) // 2


def notes_of(costs: Costs) -> list[str]:
    """Return the honest line of a method: what its zeros do not bring."""
    if costs.sparsity < 0.01:
        return []
    return [
        f"{costs.sparsity:.0%} of the weights are zero, stored dense: smaller only when compressed, not faster "
        "on standard runtimes"
    ]


def measure_latency(
    models: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    batch_sizes: Sequence[int] = (1, 256),
    runs: int = 50,
) -> dict[str, dict[str, Latency]]:
    """Return {model: {"batch_1": ..., "batch_256": ...}} in milliseconds a batch, runs interleaved over the models.

    One run of each model in turn, so that a machine that drifts slows all of them alike. At least 5 runs, at most
    `runs`, within about half a second a model and batch size; `Latency.runs` says how many there were.
    """
    found: dict[str, dict[str, Latency]] = {name: {} for name in models}
    for batch in batch_sizes:
        x = torch.zeros(batch, *shape, device=device)
        timers = {name: _timer(model, x) for name, model in models.items()}
        first = {}
        for name, timer in timers.items():
            for _ in range(WARMUP):
                first[name] = timer()
        slowest = max(first.values(), default=0.0)
        count = int(min(runs, max(MIN_RUNS, SECONDS_EACH * 1e3 / max(slowest, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(count):
            for name, timer in timers.items():
                times[name].append(timer())
        for name, values in times.items():
            q1, median, q3, p95 = np.percentile(values, [25, 50, 75, 95]).tolist()
            found[name][f"batch_{batch}"] = Latency(median=median, q1=q1, q3=q3, p95=p95, runs=count)
    return found


def _timer(model: nn.Module, x: Tensor) -> Callable[[], float]:
    def on_cpu() -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            model(x)
            return (time.perf_counter() - started) * 1e3

    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.inference_mode():
            start.record()
            model(x)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    model.eval()
    return on_cuda if x.device.type == "cuda" else on_cpu
