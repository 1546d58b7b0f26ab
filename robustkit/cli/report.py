"""`robustkit report`: write a run's report again."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from robustkit.report.inside import inside
from robustkit.report.terminal import failure_lines, print_summary
from robustkit.report.write import write_report
from robustkit.results import read_results


@click.command("report", epilog="Example: robustkit report runs/quickstart")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="Print the report's path only.")
def command(run: Path, quiet: bool) -> None:
    """Write the report of RUN (a run's folder) again from its results.json, and print the summary."""
    report = write_report(run)
    results = read_results(inside(run, "results.json"))
    if not quiet:
        print_summary(results, Console())
    click.echo(f"report: {report}")
    for line in failure_lines(results):
        click.echo(line, err=True)
