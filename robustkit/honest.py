"""What a compressed variant brought in size and speed, from what it is and what was measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.report.tables import size_text
from robustkit.results import VariantResult
from robustkit.speed import batches_against, faster, reference_of

SPARSE = 0.01
SMALLER = 0.99
"""From this share of the reference's MACs on, work was really saved."""
PATTERN = "n_m"


def cost_notes(row: VariantResult, rows: Sequence[VariantResult], compress: Sequence[str]) -> list[str]:
    """Return a sentence for each thing that was done to a variant; `compress`: names of methods down its line.

    What is said of speed is what was measured: a method that should not help is not said to, and where the clock says
    otherwise that is told.
    """
    if not compress:
        return []
    other = reference_of(row, rows)
    found = [_removed(row, other), _zeros(row, other)]
    if PATTERN in compress and row.sparsity >= SPARSE:
        found.append(
            "of every few neighbouring weights some are zero by pattern; kernels for it need an NVIDIA GPU (SM 8.0 or "
            "later) and fp16, and what was measured here runs dense"
        )
    return [text for text in found if text]


def _removed(row: VariantResult, other: VariantResult | None) -> str:
    if other is None or not row.macs or not other.macs or row.macs > SMALLER * other.macs:
        return ""
    saved = f"{other.macs / row.macs:.2g} times fewer MACs and {other.bytes / max(1, row.bytes):.2g} times fewer bytes"
    return f"{saved} than {other.name}; {_measured(row, other)}"


def _zeros(row: VariantResult, other: VariantResult | None) -> str:
    if row.sparsity < SPARSE:
        return ""
    masked = row.channels and row.zero_channels and row.zero_channels / row.channels >= row.sparsity / 2
    head = "masked, not yet removed" if masked else "sparse"
    facts = (
        f"{row.sparsity:.0%} of the weights are zero, stored dense, smaller only when compressed "
        f"({size_text(row.bytes)}, gzipped {size_text(row.gzip_bytes)})"
    )
    if masked:
        facts += (
            f"; {row.zero_channels} of {row.channels} channels have no weight left and are still computed, `shrink` "
            "removes those that are zero in every coupled layer"
        )
    if other is None or not batches_against(row, other):
        return f"{head}, no speed-up expected on standard runtimes: {facts}; latency was not compared"
    if other.macs and row.macs <= SMALLER * other.macs:
        return f"{head}: {facts}"
    if not _faster(row, other):
        return f"{head}, not faster: {facts}; {_measured(row, other)}"
    return (
        f"{head}: {facts}; {_measured(row, other)}, at equal MACs: zeros stored dense do not explain that, so measure "
        "again on an idle machine"
    )


def _faster(row: VariantResult, other: VariantResult) -> bool:
    return any(faster(one, other.latency[batch]) for batch, one in row.latency.items() if batch in other.latency)


def _measured(row: VariantResult, other: VariantResult) -> str:
    told = batches_against(row, other)
    return f"measured against {other.name}: {told}" if told else "latency was not measured"
