"""The step that times all models of a run in turn."""

from __future__ import annotations

from typing import Any

from robustkit.compress.latency import measure_latency
from robustkit.compress.timings import measure_timings
from robustkit.missing import latency_key
from robustkit.recipe.plan import Step
from robustkit.workbench import Workbench


def latency_step(bench: Workbench, step: Step) -> None:
    """Store the latency of all models that there are, measured in turns.

    Where a model is missing the step itself stays open, and the others' latency is kept under a key of its own.
    """
    keys = [key for key in dict.fromkeys(step.parents) if key not in bench.failed]
    finished = latency_key(step, bench.failed)
    if bench.store.done(finished):
        return
    models = {key: bench.load(key) for key in keys}
    shape, runtimes = bench.any_dataset().shape, bench.recipe.evaluate.runtimes
    measured = measure_latency(models, shape, bench.device) if models else {}
    record: dict[str, Any] = {
        "latency": {key: {batch: one.model_dump() for batch, one in found.items()} for key, found in measured.items()}
    }
    if models and runtimes:
        told = measure_timings(models, shape, bench.device, runtimes, on_progress=bench.progress)
        record["timings"] = {key: [one.model_dump() for one in rows] for key, rows in told.found.items()}
        record["untimed"] = told.untimed
    bench.store.finish(finished, record)
