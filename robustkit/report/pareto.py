"""Pareto fronts: variants that no other one beats in worst-case accuracy and one cost, for each cost by itself."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.results import Results, VariantResult

COSTS: dict[str, str] = {
    "bytes": "bytes of the file",
    "gzip_bytes": "gzipped bytes",
    "nonzero": "non-zero parameters",
    "macs": "MACs",
    "latency": "latency, batch 1 (ms)",
}
"""What a front may be of, by the name it has in results.json, in words."""
LATENCY = "latency"
BATCH = "batch_1"


def cost_of(row: VariantResult, cost: str) -> float | None:
    """Return a cost of a variant; None for a latency that was not measured."""
    if cost == LATENCY:
        return row.latency_ms.get(BATCH)
    return float(getattr(row, cost))


def mark_pareto(results: Results) -> Results:
    """Return the results with `fronts`, seed by seed, and `pareto`: on the front of the gzipped bytes."""
    marked = []
    for row in results.variants:
        rivals = [other for other in results.variants if other.seed == row.seed]
        fronts = [cost for cost in COSTS if on_front(row, rivals, cost)]
        marked.append(row.model_copy(update={"fronts": fronts, "pareto": "gzip_bytes" in fronts}))
    return results.model_copy(update={"variants": marked})


def on_front(row: VariantResult, rivals: Sequence[VariantResult], cost: str = "gzip_bytes") -> bool:
    """Say whether no rival is at least as good in worst case and cost and better in one.

    Latencies whose quartiles overlap are equal. A variant whose figures must not be quoted (a `wrong` flag) is on no
    front and beats nobody.
    """
    if cost_of(row, cost) is None or _wrong(row):
        return False
    return not any(_beats(other, row, cost) for other in rivals)


def front(rows: Sequence[VariantResult], cost: str) -> list[VariantResult]:
    """Return the variants on the front of a cost, the cheapest first."""
    found = [row for row in rows if cost in row.fronts]
    return sorted(found, key=lambda row: (cost_of(row, cost) or 0.0, row.worst.value))


def _beats(other: VariantResult, row: VariantResult, cost: str) -> bool:
    if cost_of(other, cost) is None or _wrong(other):
        return False
    cheaper, equal = _cheaper(other, row, cost)
    better = other.worst.value > row.worst.value
    return other.worst.value >= row.worst.value and (cheaper or equal) and (cheaper or better)


def _cheaper(other: VariantResult, row: VariantResult, cost: str) -> tuple[bool, bool]:
    """Say whether one variant is cheaper than another, and whether they cost the same."""
    if cost == LATENCY and BATCH in other.latency and BATCH in row.latency:
        mine, theirs = other.latency[BATCH], row.latency[BATCH]
        return mine.q3 < theirs.q1, mine.q1 <= theirs.q3 and theirs.q1 <= mine.q3
    one, two = cost_of(other, cost) or 0.0, cost_of(row, cost) or 0.0
    return one < two, one == two


def _wrong(row: VariantResult) -> bool:
    return any(flag.severity == "wrong" for flag in row.flags)
