"""`robustkit compare`: several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustkit.errors import UsageError
from robustkit.report.compare import Compared, compare
from robustkit.report.tables import paired_text, rate_text, size_text
from robustkit.results import printable


@click.command("compare", epilog="Example: robustkit compare runs/monday runs/tuesday")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", envvar="ROBUSTKIT_COMPARE_JSON", is_flag=True, help="Print JSON.")
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare the variants of RUNS (folders of runs); differences are to the same variant in the first run."""
    if len(runs) < 2:
        raise UsageError("give at least two runs to compare")
    found = compare(runs)
    if as_json:
        click.echo(json.dumps([_record(one) for one in found], indent=2))
    else:
        Console().print(_table(found))


def _record(one: Compared) -> dict[str, object]:
    return {
        "run": one.run,
        "variant": one.row.name,
        "seed": one.row.seed,
        "clean": one.row.clean.model_dump(),
        "worst": one.row.worst.model_dump(),
        "gzip_bytes": one.row.gzip_bytes,
        "difference": one.difference.model_dump() if one.difference else None,
    }


def _table(found: list[Compared]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("run", "variant", "seed", "clean", "worst", "gzip", "vs first run"):
        table.add_column(name, justify="left" if name in ("run", "variant") else "right")
    for one in found:
        row = one.row
        cells = [one.run, row.name, str(row.seed), rate_text(row.clean), rate_text(row.worst)]
        cells += [size_text(row.gzip_bytes), paired_text(one.difference)]
        # As Text, so that a name such as [/x] is no markup.
        table.add_row(*[Text(str(printable(cell))) for cell in cells])
    return table
