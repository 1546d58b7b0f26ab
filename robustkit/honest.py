"""What a compressed variant brought in size and speed, from what it is and what was measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustkit.report.tables import size_text
from robustkit.results import VariantResult
from robustkit.speed import batches_against, faster, reference_of, runtime_name, timings_against

SPARSE = 0.01
ROUNDED = 0.05
"""So many weights of a quantized model may be zero by rounding alone."""
SMALLER = 0.99
"""From this share of the reference's MACs on, work was really saved."""
ROUGHLY = 1.05
"""Files that differ by less are of one size."""
PATTERN = "n_m"
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True)
class Made:
    """What was done to a variant: names of the methods down its line, and bits where it is quantized."""

    compress: Sequence[str] = ()
    bits: int | None = None
    extensions: Sequence[str] = ()
    """Vector extensions of the processor that latency was measured on."""


def cost_notes(row: VariantResult, rows: Sequence[VariantResult], made: Made) -> list[str]:
    """Return a sentence for each thing that was done to a variant.

    What is said of speed is what was measured: a method that should not help is not said to, and where the clock says
    otherwise that is told.
    """
    if not made.compress:
        return []
    other = reference_of(row, rows)
    found = [_removed(row, other), _zeros(row, other, made), _bytes(row, other, made), _file(row, other, made)]
    if PATTERN in made.compress and row.sparsity >= SPARSE:
        found.append(
            "of every few neighbouring weights some are zero by pattern; kernels for it need an NVIDIA GPU (SM 8.0 or "
            "later) and fp16, and what was measured here runs dense"
        )
    return [text for text in found if text]


def _fewer_macs(row: VariantResult, other: VariantResult | None) -> bool:
    return other is not None and bool(row.macs) and row.macs <= SMALLER * other.macs


def _removed(row: VariantResult, other: VariantResult | None) -> str:
    if other is None or not _fewer_macs(row, other):
        return ""
    saved = f"{other.macs / row.macs:.2g} times fewer MACs and {other.bytes / max(1, row.bytes):.2g} times fewer bytes"
    return f"{saved} than {other.name}; {_measured(row, other)}"


def _zeros(row: VariantResult, other: VariantResult | None, made: Made) -> str:
    if row.sparsity < (SPARSE if made.bits is None else ROUNDED):
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
    if _fewer_macs(row, other) or made.bits is not None or row.runtime != other.runtime:
        # What else was done may change its speed, and has a sentence of its own.
        return f"{head}: {facts}"
    if not _faster(row, other):
        return f"{head}, not faster: {facts}; {_measured(row, other)}"
    return (
        f"{head}: {facts}; {_measured(row, other)}, at equal MACs: zeros stored dense do not explain that, so measure "
        "again on an idle machine"
    )


def _bytes(row: VariantResult, other: VariantResult | None, made: Made) -> str:
    """Return what a model that PyTorch simulates in bytes brought."""
    if made.bits is None or row.runtime != "eager":
        return ""
    if made.bits < 8:
        head = f"{made.bits} bits, simulated: nothing here computes in {made.bits} bits, size and speed are those of 8"
    else:
        head = "int8, simulated in floats by eager PyTorch"
    if other is None:
        return head
    if _slower(row, other):
        head += ", slower until lowered"
    lowered = timings_against(row, other, "inductor")
    told = f"lowered by inductor, {_vnni(made)}: {lowered}" if lowered else "lowered it was not timed (`latency: full`)"
    return f"{head}: {_smaller(row, other)}; {_measured(row, other)}; {told}"


def _file(row: VariantResult, other: VariantResult | None, made: Made) -> str:
    """Return what an ONNX file brought."""
    if row.runtime != "onnxruntime":
        return ""
    head = "an ONNX file" if made.bits is None else f"an int8 ONNX file, {_vnni(made)}"
    if other is None:
        return head
    same = timings_against(row, other, "onnxruntime")
    told = f"; against {other.name} in ONNX Runtime too: {same}" if same else ""
    return f"{head}: {_smaller(row, other)}; {_measured(row, other)}{told}"


def _vnni(made: Made) -> str:
    return "processor with VNNI" if set(VNNI) & set(made.extensions) else "processor without VNNI"


def _smaller(row: VariantResult, other: VariantResult) -> str:
    ratio = other.bytes / max(1, row.bytes)
    if 1 / ROUGHLY < ratio < ROUGHLY:
        return f"as many bytes as {other.name}"
    told = f"{ratio:.2g} times fewer bytes" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.2g} times more bytes"
    return f"{told} than {other.name}"


def _faster(row: VariantResult, other: VariantResult) -> bool:
    return any(faster(one, other.latency[batch]) for batch, one in row.latency.items() if batch in other.latency)


def _slower(row: VariantResult, other: VariantResult) -> bool:
    return any(faster(other.latency[batch], one) for batch, one in row.latency.items() if batch in other.latency)


def _measured(row: VariantResult, other: VariantResult) -> str:
    told = batches_against(row, other)
    if not told:
        return "latency was not measured"
    if row.runtime == other.runtime:
        return f"measured against {other.name}: {told}"
    return f"measured in {runtime_name(row.runtime)} against {other.name} in {runtime_name(other.runtime)}: {told}"
