"""The whole table of latencies: every model in every runtime, with one thread and all, one image and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from robustkit.compress.latency import THOROUGH, Effort, in_turns, timer
from robustkit.compress.runtimes import Prepared, compiling, forget_compiled, prepare
from robustkit.errors import ModelError
from robustkit.models.onnx_model import OnnxModel
from robustkit.results import Timing

BATCH_SIZES = (1, 256)


@dataclass
class Timings:
    """Timings by model, and by model and runtime why there are none."""

    found: dict[str, list[Timing]] = field(default_factory=dict)
    untimed: dict[str, dict[str, str]] = field(default_factory=dict)


def measure_timings(
    models: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    device: torch.device,
    runtimes: Sequence[str],
    *,
    threads: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    effort: Effort = THOROUGH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time models that take images (C, H, W), the runs of all of them in turn for each runtime, threads and batch.

    `runtimes`: of `eager`, `inductor`, `onnxruntime`; one that a model does not run in is left out with the reason.
    `threads`: default one, and as many as torch uses; on a GPU only the latter.
    """
    counts = tuple(threads) if threads is not None else thread_counts(device)
    told = Timings({name: [] for name in models}, {})
    total, done = len(runtimes) * len(counts) * len(batch_sizes), 0
    for runtime in runtimes:
        ready = _prepared(models, runtime, shape, device, told)
        for count in counts:
            for batch in batch_sizes:
                _time(ready, runtime, count, torch.zeros(batch, *shape, device=device), effort, told)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    return told


def thread_counts(device: torch.device) -> tuple[int, ...]:
    """Return one and as many threads as torch uses, each once; on a GPU only the latter."""
    every = torch.get_num_threads()
    return (every,) if device.type != "cpu" else tuple(dict.fromkeys((1, every)))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepared(
    models: Mapping[str, nn.Module],
    runtime: str,
    shape: tuple[int, int, int],
    device: torch.device,
    told: Timings,
) -> dict[str, Prepared]:
    ready = {}
    for name, model in models.items():
        if isinstance(model, OnnxModel) and runtime != "onnxruntime":
            continue
        try:
            if runtime == "onnxruntime" and device.type != "cpu":
                raise ModelError("ONNX Runtime is measured on the CPU alone")
            ready[name] = prepare(model, runtime, shape)
        except ModelError as error:
            told.untimed.setdefault(name, {})[runtime] = str(error)
    return ready


def _time(
    ready: dict[str, Prepared], runtime: str, threads: int, x: torch.Tensor, effort: Effort, told: Timings
) -> None:
    with torch_threads(threads), compiling() if runtime == "inductor" else nullcontext():
        timers = {}
        for name, made in ready.items():
            try:
                timers[name] = timer(made(x), x)
            except ModelError as error:
                told.untimed.setdefault(name, {})[runtime] = str(error)
        for name, value in in_turns(timers, effort).items():
            told.found[name].append(Timing(runtime=runtime, threads=threads, batch=len(x), **value.model_dump()))
        timers.clear()
        if runtime == "inductor":
            forget_compiled()
