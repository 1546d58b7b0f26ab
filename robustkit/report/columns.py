"""A table of chosen metrics, a row a variant, from one run or several: as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robustkit import stats
from robustkit.errors import UsageError, did_you_mean
from robustkit.judging import metric_of, rate_of
from robustkit.recipe.gates import ACCURACIES, CORRUPTED, POISONED, SIZES, curve_point
from robustkit.report.tables import (
    attack_labels,
    certificate_labels,
    count_text,
    plain_cell,
    plain_rows,
    rate_text,
    size_text,
    tree_order,
)
from robustkit.results import Results, VariantResult

Format = Literal["markdown", "latex", "csv"]
FORMATS: tuple[Format, ...] = ("markdown", "latex", "csv")
TEXTS = ("method", "parent", "flags")
DEFAULT = ("method", "clean", "worst", "gzip_bytes", "train_seconds")
_NUMBERED = re.compile(r"(\d+):(.+)")
_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$"}


@dataclass(frozen=True)
class Column:
    """A metric, and the number of the run that it is taken from."""

    metric: str
    run: int = 0

    def head(self, runs: Sequence[Results]) -> str:
        """Return the column's head; with the run's name where it is not the first one."""
        unit = " (s)" if self.metric == "train_seconds" else " (ms)" if self.metric == "latency" else ""
        name = self.metric.replace("_", " ").removesuffix(" seconds" if unit else "")
        return f"{name}{unit}" + (f", {runs[self.run].name}" if self.run else "")


def read_columns(text: str, runs: Sequence[Results]) -> list[Column]:
    """Return the columns of a text such as `clean,worst,2:success`; `2:` takes them from the second run.

    Raises:
        UsageError: a metric that the run does not know, or a run that was not given.
    """
    found = []
    for one in text.split(","):
        numbered = _NUMBERED.fullmatch(one.strip())
        metric, run = (numbered[2].strip(), int(numbered[1]) - 1) if numbered else (one.strip(), 0)
        if not 0 <= run < len(runs):
            raise UsageError(f"column {one.strip()!r}: there is no run {run + 1}; {len(runs)} given")
        _check(metric, runs[run])
        found.append(Column(metric, run))
    return found


def _check(metric: str, results: Results) -> None:
    labels = (*attack_labels(results), *certificate_labels(results))
    known = (*TEXTS, *ACCURACIES, *CORRUPTED, *POISONED, *SIZES, *labels)
    if metric not in known and curve_point(metric) is None:
        hint = did_you_mean(metric, known) or f"known: {', '.join(known)}, and points of curves such as pgd@0.1"
        raise UsageError(f"column {metric!r} is no metric of {results.name}; {hint}")


def chosen_table(runs: Sequence[Results], columns: Sequence[Column], style: Format = "markdown") -> str:
    """Return a table with a row for each variant of the first run, as text that ends without a line break.

    Accuracies are in percent with the longer arm of their 95 % interval; over several seeds mean and standard
    deviation stand instead. What was not measured is left empty. CSV has plain numbers, accuracies as shares of 1.
    """
    names = list(dict.fromkeys(row.name for row in tree_order(runs[0])))
    cell = _number if style == "csv" else _text
    rows = [[name, *[cell(_rows(name, runs[one.run]), one.metric) for one in columns]] for name in names]
    head = ["variant", *[one.head(runs) for one in columns]]
    if style == "markdown":
        return plain_rows(head, rows)
    return _latex(head, rows) if style == "latex" else _csv(head, rows)


def _rows(name: str, results: Results) -> list[VariantResult]:
    return [row for row in results.variants if row.name == name]


def _text(rows: Sequence[VariantResult], metric: str) -> str:
    if metric in TEXTS:
        return _words(rows, metric)
    rates = [rate for row in rows if (rate := rate_of(row, metric)) is not None]
    if len(rates) == 1:
        return rate_text(rates[0])
    values = [value for row in rows if not math.isnan(value := metric_of(row, metric))]
    if not values:
        return ""
    mean, spread = stats.mean_and_spread(values)
    if rates:
        return f"{100 * mean:.1f} ±{100 * spread:.1f}"
    return _size(metric, mean)


def _size(metric: str, value: float) -> str:
    if metric.endswith("bytes"):
        return size_text(value)
    if metric == "sparsity":
        return f"{100 * value:.1f}"
    return count_text(value) if metric in ("parameters", "nonzero", "macs") else f"{value:.3g}"


def _number(rows: Sequence[VariantResult], metric: str) -> str:
    if metric in TEXTS:
        return _words(rows, metric)
    values = [value for row in rows if not math.isnan(value := metric_of(row, metric))]
    return repr(stats.mean_and_spread(values)[0]) if values else ""


def _words(rows: Sequence[VariantResult], metric: str) -> str:
    if metric == "flags":
        found = dict.fromkeys(
            f"{flag.severity}: {flag.id}" for row in rows for flag in row.flags if flag.severity != "note"
        )
        return "; ".join(found)
    return next((str(getattr(row, metric) or "") for row in rows), "")


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", *body, r"\end{tabular}"])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[plain_cell(cell) for cell in row] for row in (head, *rows)])
    return buffer.getvalue().rstrip("\n")
