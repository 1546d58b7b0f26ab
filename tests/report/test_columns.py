"""`robustkit table`: chosen metrics of runs as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from robustkit import stats
from robustkit.cli.group import run as cli
from robustkit.errors import UsageError
from robustkit.report.columns import chosen_table, read_columns
from robustkit.results import Corruptions, Curve, Flag, Results, VariantResult, write_results

N = 1000


def row(name: str, worst: int, seed: int = 0, **more: object) -> VariantResult:
    values = {
        "name": name, "seed": seed, "method": "standard_training & more", "clean": stats.clopper_pearson(900, N),
        "worst": stats.clopper_pearson(worst, N), "attacks": {"pgd": stats.clopper_pearson(worst + 5, N)},
        "per_class": {"clean": {}, "worst": {}}, "parameters": 12_345, "nonzero": 1, "sparsity": 0.25, "bytes": 10,
        "gzip_bytes": 2048, "macs": 1, "train_seconds": 12.34,
    }  # fmt: skip
    return VariantResult.model_validate({**values, **more})


def results(*rows: VariantResult, name: str = "run") -> Results:
    return Results(name=name, threat={"norm": "linf", "eps": 0.1}, classes=["a"], variants=list(rows), provenance={})


ONE = results(
    row(
        "base",
        30,
        corruptions=Corruptions(mean=stats.clopper_pearson(700, N), by={}),
        curves=[Curve(attack="pgd", norm="linf", eps=[0.1], rates=[stats.clopper_pearson(250, N)])],
        flags=[Flag(id="E3", severity="doubt", message="x"), Flag(id="E5", severity="note", message="y")],
    ),
    row("robust", 600, parent="base"),
)


def table(text: str, *runs: Results, style: str = "markdown") -> str:
    return chosen_table(runs or (ONE,), read_columns(text, runs or (ONE,)), style)  # type: ignore[arg-type]


def test_markdown_has_intervals_units_and_gaps() -> None:
    found = table("method,worst,pgd,corrupted,pgd@0.1,gzip_bytes,parameters,sparsity,train_seconds,flags").splitlines()
    assert found[0].startswith("| variant | method | worst | pgd | corrupted | pgd@0.1 | gzip bytes | parameters |")
    assert found[0].endswith("train (s) | flags |")
    cells = [cell.strip() for cell in found[2].split("|")[1:-1]]
    assert cells[0] == "base"
    assert cells[2:5] == ["3.0 ±1.3", "3.5 ±1.3", "70.0 ±2.9"]
    assert cells[5:] == ["25.0 ±2.8", "2.0 kB", "12.3 k", "25.0", "12.3", "doubt: E3"]
    assert [cell.strip() for cell in found[3].split("|")[4:7]] == ["60.5 ±3.1", "", ""]


def test_several_seeds_give_mean_and_deviation() -> None:
    seeds = results(*(row("a", worst, seed) for seed, worst in enumerate((300, 400, 500))))
    assert table("worst,train_seconds", seeds).splitlines()[2] == "| a | 40.0 ±10.0 | 12.3 |"


def test_a_column_of_a_second_run_is_by_the_variants_name() -> None:
    other = results(row("robust", 100), name="other")
    found = table("worst,2:worst", ONE, other).splitlines()
    assert found[0] == "| variant | worst | worst, other |"
    assert found[2].endswith("|  |")
    assert "10.0" in found[3]


def test_latex_is_escaped_and_csv_is_numbers() -> None:
    latex = table("method,clean", style="latex")
    assert r"standard\_training \& more & 90.0 $\pm$2.0 \\" in latex
    assert latex.startswith(r"\begin{tabular}{lrr}")
    rows = list(csv.DictReader(io.StringIO(table("worst,corrupted,train_seconds", style="csv"))))
    assert [float(one["worst"]) for one in rows] == [0.03, 0.6]
    assert [one["corrupted"] for one in rows] == ["0.7", ""]


@pytest.mark.parametrize(
    ("text", "said"),
    [("worts", "did you mean 'worst'?"), ("2:worst", "there is no run 2"), ("0:worst", "there is no run 0")],
)
def test_wrong_columns_are_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        read_columns(text, [ONE])


def test_the_command_prints_chosen_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(ONE, tmp_path / "results.json")
    assert cli(["table", str(tmp_path), "--columns", "worst", "--variants", "robust"]) == 0
    assert capsys.readouterr().out == "| variant | worst |\n|---|---|\n| robust | 60.0 ±3.1 |\n"
    again = tmp_path / "again"
    again.mkdir()
    write_results(ONE, again / "results.json")
    assert cli(["table", str(tmp_path), str(again), "--columns", "worst,2:clean", "--variants", "robust"]) == 0
    assert "| variant | worst | clean, again |" in capsys.readouterr().out, "of one recipe, told by their folders"
    assert cli(["table", str(tmp_path), "--variants", "nobody"]) == 2
    assert "no variant 'nobody'" in capsys.readouterr().err
    assert cli(["table", str(tmp_path), "--columns", "cleen"]) == 2
