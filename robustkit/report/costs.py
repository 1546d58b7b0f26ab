"""The tables of size and speed."""

from __future__ import annotations

from robustkit.report.tables import count_text, display_name, latency_text, ms_text, size_text, tree_order
from robustkit.results import Results, Timing
from robustkit.speed import batches_against, reference_of

COST_HEAD = (
    "variant",
    "parameters",
    "non-zero",
    "bytes",
    "gzip",
    "MACs",
    "peak activations",
    "batch 1",
    "batch 256",
    "against",
    "measured",
)
COST_NOTE = (
    "Bytes are of the variant's file, MACs and peak activations of one image. Peak activations: the most bytes that "
    "its forward holds at once, the image included, weights and what kernels need inside not. Latency: median and "
    "quartiles of interleaved runs; two are not distinguishable where the ranges between their quartiles overlap."
)
TIMING_HEAD = ("variant", "runtime", "threads", "batch", "median", "quartiles", "p95", "runs", "against")
TIMING_NOTE = (
    "Milliseconds a batch. The runs of all variants are interleaved within a runtime, number of threads and batch "
    "size, after a warm-up; large batches have fewer than 50 where these would take too long."
)


def cost_rows(results: Results) -> list[list[str]]:
    """Return a row for each variant: sizes, work, latency, and how that compares with its parent's."""
    rows = []
    for row in tree_order(results):
        other = reference_of(row, results.variants)
        activations = "" if row.activation_bytes is None else size_text(row.activation_bytes)
        sizes = [count_text(row.parameters), count_text(row.nonzero), size_text(row.bytes), size_text(row.gzip_bytes)]
        latencies = [latency_text(row, "batch_1"), latency_text(row, "batch_256")]
        beside = [other.name, batches_against(row, other)] if other and row.latency else ["", ""]
        rows.append([display_name(row, results), *sizes, count_text(row.macs), activations, *latencies, *beside])
    return rows


def timing_rows(results: Results) -> list[list[str]]:
    """Return a row for each variant, runtime, number of threads and batch size."""
    return [
        [
            display_name(row, results),
            one.runtime,
            str(one.threads),
            str(one.batch),
            ms_text(one.median),
            f"{ms_text(one.q1)}-{ms_text(one.q3)}",
            ms_text(one.p95),
            str(one.runs),
            versus_text(one),
        ]
        for row in tree_order(results)
        for one in row.timings
    ]


def versus_text(one: Timing) -> str:
    """Return `2.6 times as fast as baseline`, or that the two cannot be told apart."""
    if one.versus is None or one.ratio is None:
        return ""
    if not one.distinguishable:
        return f"not distinguishable from {one.versus}"
    return f"{one.ratio:.2f} times as fast as {one.versus}"
