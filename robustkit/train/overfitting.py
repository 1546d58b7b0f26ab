"""Robust overfitting: attacked accuracy that falls on held-out images while it rises on those trained on."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.results import EpochRow, Flag

FALL = 0.02
"""Fall of attacked accuracy on the validation split from which it is worth a note."""


def overfitting_flags(rows: Sequence[EpochRow], best_epoch: int) -> list[Flag]:
    """Return a note where the last epoch is attacked better than the best one (Rice et al. 2020).

    Both are told on the same validation images; which of them was kept, `select` decides.
    """
    known = [row for row in rows if row.robust is not None]
    if not known:
        return []
    best, last = max(known, key=lambda row: row.robust or 0.0), known[-1]
    fall = (best.robust or 0.0) - (last.robust or 0.0)
    if fall <= FALL or last.train_accuracy <= best.train_accuracy:
        return []
    message = (
        f"robust overfitting: {best.robust:.1%} withstood the validation attack after epoch {best.epoch + 1}, "
        f"{last.robust:.1%} after the last one, while training accuracy rose from {best.train_accuracy:.1%} to "
        f"{last.train_accuracy:.1%}; kept is epoch {best_epoch + 1}"
    )
    return [Flag(id="robust-overfitting", severity="note", message=message)]
