"""Whether one model is faster than another, as far as the runs tell. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robustkit.results import Latency, Timing, VariantResult

SLIGHT = 1.1
"""From here on a ratio is told as so many times."""


def distinguishable(one: Latency, other: Latency) -> bool:
    """Say whether two latencies differ: their ranges from the first to the third quartile lie apart."""
    return one.q3 < other.q1 or other.q3 < one.q1


def faster(one: Latency, other: Latency) -> bool:
    """Say whether `one` is distinguishably faster than `other`."""
    return one.q3 < other.q1


def against(one: Latency, other: Latency) -> str:
    """Return `2.6 times faster`, `1.2 times slower`, `4% faster` or `not distinguishable`."""
    if not distinguishable(one, other):
        return "not distinguishable"
    ratio = max(other.median, 1e-9) / max(one.median, 1e-9)
    ratio, which = (ratio, "faster") if faster(one, other) else (1 / ratio, "slower")
    return f"{ratio:.2g} times {which}" if ratio >= SLIGHT else f"{100 * (ratio - 1):.1g}% {which}"


def batches_against(row: VariantResult, other: VariantResult) -> str:
    """Return `2.6 times faster at batch 1, not distinguishable at batch 256`; empty where nothing was measured."""
    found: dict[str, list[str]] = {}
    for batch, one in row.latency.items():
        if batch in other.latency:
            found.setdefault(against(one, other.latency[batch]), []).append(batch.removeprefix("batch_"))
    return ", ".join(f"{text} at batch {' and '.join(batches)}" for text, batches in found.items())


def timings_against(row: VariantResult, other: VariantResult, runtime: str) -> str:
    """Return the same of the timings that both have in a runtime: `1 thread: 2.6 times faster at batch 1`."""
    theirs = {_place(one): one for one in other.timings}
    found: dict[int, dict[str, list[str]]] = {}
    for one in row.timings:
        if one.runtime == runtime and _place(one) in theirs:
            told = found.setdefault(one.threads, {})
            told.setdefault(against(one, theirs[_place(one)]), []).append(str(one.batch))
    return "; ".join(
        f"{threads} thread{'' if threads == 1 else 's'}: "
        + ", ".join(f"{text} at batch {' and '.join(batches)}" for text, batches in told.items())
        for threads, told in found.items()
    )


def runtime_name(runtime: str) -> str:
    """Return what a runtime is called."""
    return {"eager": "eager PyTorch", "onnxruntime": "ONNX Runtime"}.get(runtime, runtime)


def reference_of(row: VariantResult, rows: Sequence[VariantResult]) -> VariantResult | None:
    """Return what a row is compared with: its parent, without one the first variant; None for the first itself."""
    same = [one for one in rows if one.seed == row.seed]
    parent = next((one for one in same if one.name == row.parent), None)
    first = same[0] if same else None
    return parent or (first if first is not None and first.name != row.name else None)


def compared(rows: Sequence[VariantResult]) -> list[VariantResult]:
    """Return the rows with each timing beside the same one of the row's reference."""
    return [_compared(row, reference_of(row, rows)) for row in rows]


def _compared(row: VariantResult, other: VariantResult | None) -> VariantResult:
    if other is None or not row.timings:
        return row
    theirs = {_place(one): one for one in other.timings}
    return row.model_copy(update={"timings": [_beside(one, theirs, other.name) for one in row.timings]})


def _beside(one: Timing, theirs: Mapping[tuple[str, int, int], Timing], name: str) -> Timing:
    other = theirs.get(_place(one))
    if other is None:
        return one
    ratio = round(other.median / max(one.median, 1e-9), 4)
    return one.model_copy(update={"versus": name, "ratio": ratio, "distinguishable": distinguishable(one, other)})


def _place(one: Timing) -> tuple[str, int, int]:
    return one.runtime, one.threads, one.batch
