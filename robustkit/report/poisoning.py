"""What poisoned training data did, and what each filter found of it, as rows of text."""

from __future__ import annotations

from robustkit.report.tables import display_name, percent, rate_text, tree_order
from robustkit.results import Results, VariantResult

FILTER_HEAD = ("variant", "clean", "success", "filter", "removed", "precision", "recall", "poisons left")
NO_FILTER = "none"
FILTER_NOTE = (
    "Success: the share (%) of test images with the trigger of the poison, without those of its target, that are taken "
    "for the target. Precision: how much of what a filter removed is poisoned; recall: how much of the poison it "
    "removed. Test images and clean accuracy are free of poison."
)

TOLERANCE_NOTE = (
    "Accuracy (%) that is certain whatever so many poisons do to the training data: an example each, added, taken out "
    "or relabelled. Each reaches one member of the vote."
)


def is_poisoned(results: Results) -> bool:
    """Say whether the training data of a run were poisoned."""
    return any(row.poisoning for row in results.variants)


def success_text(row: VariantResult) -> str:
    """Return the attack success rate of a variant with its interval, in percent; empty without poison."""
    return rate_text(row.poisoning.success) if row.poisoning else ""


def filter_rows(results: Results) -> list[list[str]]:
    """Return a row for each variant and filter: what it removed, and how much of that was poisoned."""
    rows = []
    for row in tree_order(results):
        if row.poisoning is None:
            continue
        head = [display_name(row, results), rate_text(row.clean), success_text(row)]
        left = "" if row.poisoning.left is None else f"{row.poisoning.left} of {row.poisoning.poisoned}"
        for one in row.poisoning.filters:
            found = [_share(one.precision), _share(one.recall)]
            rows.append([*head, one.defense, str(one.removed), *found, left])
        if not row.poisoning.filters:
            rows.append([*head, NO_FILTER, "0", "", "", left])
    return rows


def tolerance_table(results: Results) -> list[list[str]]:
    """Return a head and a row for each vote: accuracy that so many poisons cannot change; empty without a vote."""
    voting = [row for row in tree_order(results) if row.tolerance]
    counts = sorted({count for row in voting for count in (row.tolerance.poisons if row.tolerance else ())})
    rows = [["variant", "members", *[f"{count} {'poison' if count == 1 else 'poisons'}" for count in counts]]]
    for row in voting:
        if row.tolerance is not None:
            found = dict(zip(row.tolerance.poisons, row.tolerance.accuracy, strict=True))
            cells = [rate_text(found[count]) if count in found else "" for count in counts]
            rows.append([display_name(row, results), str(row.tolerance.members), *cells])
    return rows if voting else []


def _share(value: float | None) -> str:
    return "" if value is None else f"{percent(value)} %"
