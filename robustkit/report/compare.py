"""The variants of several runs side by side, paired where measured by the same attacks on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.errors import UsageError
from robustkit.report.gallery import BROKEN
from robustkit.report.inside import inside
from robustkit.results import Paired, Results, VariantResult, read_results


@dataclass(frozen=True)
class Compared:
    """One variant of one run; `difference` is its worst case minus that of the same variant in the first run."""

    run: str
    row: VariantResult
    difference: Paired | None


def compare(runs: Sequence[Path]) -> list[Compared]:
    """Return the variants of all runs, those of the first run first.

    Raises:
        UsageError: a folder holds no results, or one of its arrays is broken.
    """
    loaded = [(path, read_results(inside(path, "results.json"))) for path in runs]
    first_path, first = loaded[0]
    found = []
    for path, results in loaded:
        for row in results.variants:
            partner = next((one for one in first.variants if (one.name, one.seed) == (row.name, row.seed)), None)
            paired = None
            if path != first_path and partner is not None and _same_examples(first, results):
                paired = _paired(first_path, partner, path, row)
            found.append(Compared(path.name, row, paired))
    return found


def _same_examples(one: Results, other: Results) -> bool:
    return one.provenance.get("data") == other.provenance.get("data") and one.threat == other.threat


def _paired(first: Path, partner: VariantResult, second: Path, row: VariantResult) -> Paired | None:
    if set(partner.attacks) != set(row.attacks):
        return None
    before, after = _worst(first, partner), _worst(second, row)
    if before is None or after is None or before.shape != after.shape:
        return None
    return stats.paired(before, after)


def _worst(run: Path, row: VariantResult) -> NDArray[np.bool_] | None:
    if row.arrays is None:
        return None
    path = inside(run, row.arrays)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays["correct/worst"], dtype=bool)
    except BROKEN as error:
        raise UsageError(f"{path}: broken arrays: {error}") from error
