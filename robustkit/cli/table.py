"""`robustkit table`: chosen metrics of a run, for a paper or a page."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from robustkit.errors import UsageError
from robustkit.report.columns import DEFAULT, Format, chosen_table, read_columns
from robustkit.report.inside import inside
from robustkit.results import printable, read_results


@click.command("table", epilog="Example: robustkit table runs/mine --columns clean,worst,pgd@0.1 --format latex")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--columns",
    default=",".join(DEFAULT),
    show_default=True,
    help="Metrics as in gates, method, parent, flags; 2:METRIC takes it from the second run.",
)
@click.option(
    "--format",
    "style",
    envvar="ROBUSTKIT_TABLE_FORMAT",
    type=click.Choice(get_args(Format)),
    default="markdown",
    show_default=True,
)
@click.option("--variants", default="", help="Only these, in this order: a,b,c. Default: all.")
def command(runs: tuple[Path, ...], columns: str, style: Format, variants: str) -> None:
    """Print a table of the variants of RUNS (folders of runs) from their results.json, a row a variant of the first."""
    # By their folders: a recipe that was run twice has one name.
    loaded = [read_results(inside(run, "results.json")).model_copy(update={"name": run.resolve().name}) for run in runs]
    names = [name.strip() for name in variants.split(",") if name.strip()]
    known = {row.name for row in loaded[0].variants}
    missing = [name for name in names if name not in known]
    if missing:
        raise UsageError(f"{loaded[0].name} has no variant {missing[0]!r}; it has {', '.join(sorted(known))}")
    if names:
        kept = [row for name in names for row in loaded[0].variants if row.name == name]
        loaded[0] = loaded[0].model_copy(update={"variants": kept})
    table = chosen_table(loaded, read_columns(columns, loaded), style)
    click.echo("\n".join(str(printable(line)) for line in table.splitlines()))
