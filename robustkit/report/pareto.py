"""The Pareto front: variants that no other one beats in both worst-case accuracy and stored size."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.results import Results, VariantResult


def mark_pareto(results: Results) -> Results:
    """Return the results with `pareto` set: highest worst-case accuracy for the gzipped size, seed by seed."""
    marked = []
    for row in results.variants:
        rivals = [other for other in results.variants if other.seed == row.seed]
        marked.append(row.model_copy(update={"pareto": on_front(row, rivals)}))
    return results.model_copy(update={"variants": marked})


def on_front(row: VariantResult, rivals: Sequence[VariantResult]) -> bool:
    """Say whether no rival is at least as good in both and better in one."""
    return not any(
        other.worst.value >= row.worst.value
        and other.gzip_bytes <= row.gzip_bytes
        and (other.worst.value > row.worst.value or other.gzip_bytes < row.gzip_bytes)
        for other in rivals
    )
