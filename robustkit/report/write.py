"""Writes every file of a report from a run's folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from robustkit.errors import UsageError
from robustkit.report.figures import figures
from robustkit.report.gallery import galleries
from robustkit.report.inside import inside
from robustkit.report.junit import to_junit
from robustkit.report.page import context, to_html, to_markdown
from robustkit.report.tables import to_csv
from robustkit.results import read_results
from robustkit.store import write_atomic


def write_report(run: Path) -> Path:
    """Write report.html, report.md, results.csv, junit.xml and figures/*.svg; return the path of report.html.

    A broken gallery does not keep the other files from being written; it is raised at the end.

    Raises:
        UsageError: the folder holds no results.json that robustkit can read, a gallery in it is broken, or a file
            of it leads out of the folder.
    """
    if not (run / "results.json").is_file():
        raise UsageError(f"{run}: holds no results.json; give the folder of a run, e.g. runs/quickstart")
    results = read_results(inside(run, "results.json"))
    recipe = _recipe(run)
    write_atomic(run / "results.csv", to_csv(results).encode())
    write_atomic(run / "junit.xml", to_junit(results).encode())
    drawn = figures(results)
    for name, svg in drawn.items():
        write_atomic(inside(run, f"figures/{name}.svg"), svg.encode())
    broken: UsageError | None = None
    try:
        pictures = galleries(run, results)
    except UsageError as error:
        pictures, broken = [], error
    values = context(run, results, drawn, pictures, recipe)
    write_atomic(run / "report.md", to_markdown(values).encode())
    write_atomic(run / "report.html", to_html(values).encode())
    if broken is not None:
        raise broken
    return run / "report.html"


def _recipe(run: Path) -> str:
    try:
        return inside(run, "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
