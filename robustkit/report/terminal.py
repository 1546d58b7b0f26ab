"""The summary in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustkit.report.poisoning import NO_FILTER, filter_rows, is_poisoned, success_text, tolerance_table
from robustkit.report.tables import (
    attack_labels,
    beside,
    beside_head,
    certificate_labels,
    corruption_names,
    display_name,
    distance_rows,
    failed_name,
    gate_text,
    paired_text,
    percent,
    rate_text,
    size_text,
    spreads,
    tree_order,
)
from robustkit.report.verdict import verdict
from robustkit.results import Results, VariantResult

NARROW = 100


def summary(results: Results, width: int = 160) -> Table:
    """Return the table of variants; a narrow terminal gets the accuracies first and fewer columns."""
    labels = attack_labels(results)
    narrow = width < NARROW
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    table.add_column("variant", no_wrap=not narrow)
    poisoned = ("success",) if is_poisoned(results) else ()
    for name in ("clean", *poisoned, *(() if narrow else labels), "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in () if narrow else beside_head(certificate_labels(results), bool(corruption_names(results))):
        table.add_column(name, justify="right")
    table.add_column("vs parent", no_wrap=not narrow)
    if not narrow:
        for name in ("nonzero", "gzip", "latency"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in tree_order(results):
        table.add_row(*_cells(row, results, labels, narrow))
    return table


def _cells(row: VariantResult, results: Results, labels: list[str], narrow: bool) -> list[Text]:
    wrong = any(flag.severity == "wrong" for flag in row.flags)
    mark = " !" if wrong else ""
    cells = [Text("  " * row.depth + display_name(row, results) + mark, style="red" if wrong else "")]
    cells.append(Text(rate_text(row.clean)))
    if is_poisoned(results):
        cells.append(Text(success_text(row)))
    if not narrow:
        cells += [Text(percent(row.attacks[label].value) if label in row.attacks else "") for label in labels]
    cells.append(Text(rate_text(row.worst), style="bold"))
    if not narrow:
        cells += map(Text, beside(row, certificate_labels(results), bool(corruption_names(results))))
    cells.append(Text(paired_text(row.versus_parent)))
    if not narrow:
        latency = row.latency_ms.get("batch_1")
        star = "*" if row.sparsity > 0.01 else ""
        cells.append(Text(f"{row.nonzero / max(1, row.parameters):.0%}"))
        cells.append(Text(size_text(row.gzip_bytes) + star))
        cells.append(Text(f"{latency:.3g} ms" if latency is not None else ""))
    return cells


def print_summary(results: Results, console: Console) -> None:
    """Print the table, what it says, the gates and the flags."""
    console.print()
    console.print(summary(results, console.width))
    for spread in spreads(results):
        console.print(
            f"{spread.name}: mean of {spread.seeds} seeds: clean {percent(spread.clean)} "
            f"(sd {percent(spread.clean_spread)}), worst {percent(spread.worst)} (sd {percent(spread.worst_spread)})",
            highlight=False,
            markup=False,
        )
    if any(row.sparsity > 0.01 for row in results.variants):
        _line(console, "* zeros stored dense: smaller only when compressed", "dim")
    for row in tree_order(results):
        for note in row.cost_notes:
            _line(console, f"{display_name(row, results)}: {note}", "dim")
    console.print()
    for sentence in verdict(results):
        _line(console, sentence)
    for name, label, norm, median, found in distance_rows(results):
        _line(console, f"{name}: median {norm} distance {median} under {label}, found for {found}")
    for name, _, _, defense, removed, precision, recall, _ in filter_rows(results):
        if defense != NO_FILTER:
            found = f"precision {precision or 'none'}, recall {recall or 'none'}"
            _line(console, f"{name}: {defense} removed {removed}: {found} of the poison")
    head, *rows = tolerance_table(results) or [[]]
    for name, _, *cells in rows:
        known = [f"{cell} for {count}" for cell, count in zip(cells, head[2:], strict=True) if cell]
        _line(console, f"{name}: certain whatever poisons do: {', '.join(known)}")
    for gate in results.gates:
        style = "green" if gate.holds else "bold red"
        _line(console, f"gate {gate.verdict}: {gate.text}  ({gate_text(gate)})", style)
    for row in results.variants:
        for flag in row.flags:
            if flag.severity != "note":
                style = "red" if flag.severity == "wrong" else "yellow"
                _line(console, f"{flag.severity} [{flag.id}] {row.name}: {flag.message}", style)


def failure_lines(results: Results) -> list[str]:
    """Return a line for each step that failed."""
    return [f"failed: {failed_name(one, results)}: {one.message}" for one in results.failures]


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
