"""The report: one offline file, right figures, nothing hostile let through, no torch."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as tree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustkit import stats
from robustkit.cli.group import run as cli
from robustkit.errors import UsageError
from robustkit.report.compare import compare
from robustkit.report.pareto import mark_pareto
from robustkit.report.tables import tree_order
from robustkit.report.verdict import verdict
from robustkit.report.write import write_report
from robustkit.results import (
    Curve,
    Distances,
    EpochRow,
    Flag,
    GateResult,
    Latency,
    LayerSparsity,
    Results,
    StepFailure,
    VariantResult,
    read_results,
    write_results,
)  # fmt: skip
from robustkit.store import write_npz

EVIL = '<script>alert("x")</script>&"\''


def variant(
    name: str, clean: int, worst: int, *, parent: str | None = None, gzip: int = 1000, **more: object
) -> VariantResult:
    values: dict[str, object] = {
        "name": name,
        "seed": 0,
        "parent": parent,
        "method": "n_fgsm",
        "clean": stats.clopper_pearson(clean, 100),
        "attacks": {"fgsm": stats.clopper_pearson(worst + 5, 100), "pgd": stats.clopper_pearson(worst, 100)},
        "worst": stats.clopper_pearson(worst, 100),
        "versus_parent": stats.paired(np.arange(100) < 60, np.arange(100) < worst) if parent else None,
        "per_class": {"clean": {"cat": 0.9, "dog": 0.8}, "worst": {"cat": 0.5, "dog": 0.25}},
        "curves": [
            Curve(
                attack="pgd", norm="linf", eps=[0, 0.1], rates=[stats.clopper_pearson(k, 100) for k in (clean, worst)]
            )
        ],
        "distances": {
            "ddn": Distances(norm="l2", median=0.123, found=0.9, n=100, eps=[0, 0.1, 0.2], accuracy=[0.8, 0.5, 0.1]),
            EVIL: Distances(norm="l2", median=None, found=0.25, n=100, eps=[0, 3], accuracy=[0.8, 0.6]),
        },
        "parameters": 1000,
        "nonzero": 500,
        "bytes": 4000,
        "gzip_bytes": gzip,
        "macs": 123_456,
        "latency_ms": {"batch_1": 1.5, "batch_256": 40.0},
        "latency": {
            batch: Latency(median=median, q1=0.9 * median, q3=1.1 * median, p95=2 * median, runs=50)
            for batch, median in (("batch_1", 1.5), ("batch_256", 40.0))
        },
        "sparsity": 0.5 if parent else 0.0,
        "layers": [LayerSparsity(name="conv1.weight", size=800, zeros=500)],
        "epochs": [EpochRow(epoch=n, loss=1 / (n + 1), train_accuracy=0.5, clean=0.6, robust=0.4) for n in range(3)],
    }
    return VariantResult.model_validate({**values, **more})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with three variants, a flag, gates, galleries and a recipe."""
    folder = tmp_path / "some-run"
    folder.mkdir()
    generator = np.random.default_rng(0)
    write_npz(
        folder / "gallery.npz",
        {
            "clean": generator.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8),
            "adversarial": generator.random((2, 3, 8, 8), dtype=np.float32),
            "label": np.array([0, 1]),
            "prediction_clean": np.array([0, 1]),
            "prediction_adversarial": np.array([1, 1]),
            "confidence_clean": np.array([0.9, 0.8], dtype=np.float32),
            "confidence_adversarial": np.array([0.7, 0.6], dtype=np.float32),
            "norm": np.array([0.1, 0.1], dtype=np.float32),
        },
    )
    flag = Flag(id="E3", severity="doubt", message=f"square {EVIL} fools more")
    results = Results(
        name="some-run",
        threat={"norm": "linf", "eps": 0.1},
        classes=["cat", "dog"],
        variants=[
            variant("baseline", 95, 2, gzip=2000),
            variant("robust", 85, 60, gallery="gallery.npz", gzip=1900),
            variant("pruned", 84, 57, parent="robust", flags=[flag], notes=["stored dense"]),
        ],
        gates=[
            GateResult(text="clean(baseline) >= 85%", left=0.95, right=0.85, verdict="holds"),
            GateResult(text="worst(pruned) >= 58%", left=0.57, right=0.58, verdict="fails (within noise)"),
        ],
        provenance={"python": "3.11", "data": {"name": EVIL, "fingerprint": "abc"}},
    )
    write_results(mark_pareto(results), folder / "results.json")
    (folder / "recipe.yaml").write_text(f"name: some-run  # {EVIL}\n")
    return folder


def test_the_report_has_every_part(run: Path) -> None:
    write_report(run)
    html = (run / "report.html").read_text()
    for part in (
        "most robust", "clean(baseline) &gt;= 85%", "fails (within noise)", "Security curves",
        "Worst case against clean",
        "Worst case against size", "under each attack", "Training:", "E3", "conv1.weight", "python", "name: some-run",
        "stored dense", "data:image/png;base64,", "worst class",
    ):  # fmt: skip
        assert part.lower() in html.lower(), part
    assert html.count("<svg") >= 5
    markdown = (run / "report.md").read_text()
    for part in ("| robust", "**", "60.0", "fails (within noise)", "E3"):
        assert part in markdown


def test_the_report_is_one_small_file_without_scripts_or_links(run: Path) -> None:
    write_report(run)
    path = run / "report.html"
    assert path.stat().st_size < 2_000_000
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    Reader().feed(path.read_text())
    assert not {tag for tag, _ in seen} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in seen:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href") and value:
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:60])
    style = " ".join(re.findall(r"<style>(.*?)</style>", path.read_text(), re.S))
    assert "@import" not in style
    assert not re.findall(r"url\((?!#|\"?data:)", style)


def test_hostile_text_is_escaped_everywhere(run: Path) -> None:
    write_report(run)
    for name in ("report.html",):
        text = (run / name).read_text()
        assert "<script>" not in text
        assert "&lt;script&gt;" in text


def test_figures_and_junit_are_valid_xml(run: Path) -> None:
    write_report(run)
    figures = sorted((run / "figures").glob("*.svg"))
    assert {"tradeoff", "curves", "size", "attacks", "training"} <= {path.stem for path in figures}
    for path in figures:
        assert tree.parse(path).getroot().tag.endswith("svg")
    suite = tree.parse(run / "junit.xml").getroot()
    cases = list(suite.iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None]
    assert [case.get("name") for case in failures] == ["worst(pruned) >= 58%"]


def test_the_tables_hold_the_numbers(run: Path) -> None:
    write_report(run)
    rows = list(csv.DictReader(io.StringIO((run / "results.csv").read_text())))
    assert [row["name"] for row in rows] == ["baseline", "robust", "pruned"]
    assert float(rows[1]["worst"]) == 0.6
    assert float(rows[1]["attack:fgsm"]) == 0.65
    assert int(rows[2]["gzip_bytes"]) == 1000


def test_the_report_is_the_same_each_time(run: Path) -> None:
    write_report(run)
    first = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run)
    assert first == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def spoil(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return do


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "results.json"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "results.json"),
        (lambda path: path.write_text('{"schema": 1'), "results.json"),
        (lambda path: path.write_text("[1, 2]"), "not a results.json that"),
        (lambda path: path.unlink(), "holds no results.json"),
        (spoil(lambda found: found["variants"][0].pop("clean")), "clean"),  # type: ignore[index]
        (spoil(lambda found: found["variants"][1].update(gallery="../../secret.npz")), "outside"),  # type: ignore[index]
    ],
    ids=["empty", "binary", "cut", "list", "missing", "key", "outside"],
)
def test_broken_results_are_named(damage: Callable[[Path], None], message: str, run: Path) -> None:
    damage(run / "results.json")
    with pytest.raises(UsageError, match=re.escape(message)):
        write_report(run)


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "figures", "figures/size.svg", "gallery.npz"])
def test_links_out_of_the_folder_are_not_followed(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "elsewhere"
    if name == "figures":
        secret.mkdir()
    elif (run / name).is_file():
        (run / name).rename(secret)
    else:
        secret.write_text("precious")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(secret)
    before = secret.read_bytes() if secret.is_file() else None
    assert cli(["report", str(run)]) == 2
    assert f"{run}: {name}" in (shown := capsys.readouterr().err)
    assert "leads outside of the run's folder" in shown
    assert not (secret.is_dir() and list(secret.iterdir()))
    assert before is None or secret.read_bytes() == before


@pytest.mark.parametrize("name", ["/etc/passwd", "../elsewhere.npz", "loop"])
def test_compare_opens_no_array_outside(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "loop").symlink_to("loop")
    write_npz(run.parent / "elsewhere.npz", {"correct/worst": np.ones(100, dtype=bool)})
    other = run.with_name("other")
    shutil.copytree(run, other, symlinks=True)
    spoil(change((*ROW, "arrays"), name))(run / "results.json")
    spoil(change((*ROW, "arrays"), name))(other / "results.json")
    assert cli(["compare", str(run), str(other)]) == 2
    assert name in capsys.readouterr().err


def test_compare_pairs_where_the_attacks_are_the_same(run: Path) -> None:
    write_npz(run / "worst.npz", {"correct/worst": np.arange(100) < 60})
    other = run.with_name("other")
    spoil(change((*ROW, "arrays"), "worst.npz"))(run / "results.json")
    shutil.copytree(run, other)
    assert [one.difference is not None for one in compare([run, other])] == [False] * 4 + [True, False]
    spoil(lambda found: found["variants"][1]["attacks"].pop("pgd"))(other / "results.json")  # type: ignore[index]
    assert not any(one.difference for one in compare([run, other]))


def change(path: tuple[str | int, ...], value: object) -> Callable[[dict[str, object]], object]:
    def do(found: dict[str, object]) -> None:
        place: Any = found
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return do


ROW = ("variants", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 99, "schema: schema 99 is of a later robustkit, this one reads 1; update robustkit"),
        (("threat", "eps"), "abc", "threat: a threat has a norm"),
        (("threat",), {"norm": "linf"}, "threat: a threat has a norm"),
        (("threat", "norm"), "$\\foo$", "threat: a threat has a norm"),
        ((*ROW, "worst", "value"), math.nan, "variants.1.worst.value: Input should be a finite number"),
        ((*ROW, "clean", "high"), math.inf, "variants.1.clean.high"),
        ((*ROW, "clean", "low"), 0.99, "an accuracy lies outside of its own interval"),
        ((*ROW, "latency", "batch_1", "median"), math.nan, "latency.batch_1.median"),
        ((*ROW, "latency_ms", "batch_1"), math.inf, "latency_ms.batch_1"),
        ((*ROW, "curves", 0, "rates"), [], "a curve has 2 eps and 0 rates"),
        ((*ROW, "distances", "ddn", "eps"), [0.5], "distances have 1 eps and 3 accuracies"),
        ((*ROW, "distances", "ddn", "median"), math.inf, "distances.ddn.median"),
        ((*ROW, "distances", "ddn", "found"), 1.5, "distances.ddn.found"),
        ((*ROW, "per_class", "worst", "cat"), math.nan, "per_class.worst.cat"),
        ((*ROW, "gzip_bytes"), 10**400, "gzip_bytes: Input should be less than or equal to"),
        ((*ROW, "depth"), 10**9, "depth"),
        ((*ROW, "attacks", "\x1b[31m"), 3, "variants.1.attacks.[31m"),
    ],
)
def test_figures_that_cannot_be_are_named(
    path: tuple[str | int, ...], value: object, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(change(path, value))(run / "results.json")
    for arguments in (["report", str(run)], ["compare", str(run), str(run)]):
        assert cli(arguments) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert "\x1b" not in shown


def test_rows_that_start_from_each_other_are_shown(run: Path) -> None:
    spoil(change((*ROW, "parent"), "robust"))(run / "results.json")
    spoil(change(("variants", 0, "parent"), "pruned"))(run / "results.json")
    found = read_results(run / "results.json")
    assert {row.name for row in tree_order(found)} == {"baseline", "robust", "pruned"}
    assert len(tree_order(found)) == 3
    chain = [variant(str(n), 90, 50, parent=str(n - 1) if n else None) for n in reversed(range(3000))]
    assert [row.name for row in tree_order(Results(variants=chain))] == [str(n) for n in range(3000)]


def test_names_are_neither_markup_nor_terminal_sequences(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(change((*ROW, "name"), "[/x]\x1b[31m\x9b\u202e"))(run / "results.json")
    spoil(change(("failures",), [{"step": "fit", "message": "\x1b]0;title\x07oh"}]))(run / "results.json")
    assert cli(["report", str(run)]) == 0
    shown = capsys.readouterr()
    assert "failed: all variants (fit): ]0;titleoh" in shown.err
    assert cli(["compare", str(run), str(run)]) == 0
    text = shown.out + shown.err + capsys.readouterr().out
    assert text.count("[/x][31m") >= 3
    assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(text)


def test_classes_without_a_figure_are_left_out(run: Path) -> None:
    many = {f"class {n}": 0.5 for n in range(45)}
    spoil(change(("variants", 0, "per_class", "worst"), many))(run / "results.json")
    write_report(run)
    assert (run / "figures" / "classes.svg").stat().st_size > 0


def test_a_loss_that_was_not_finite_is_written_and_read(tmp_path: Path) -> None:
    epochs = [EpochRow(epoch=0, loss=math.nan, train_accuracy=0.1, clean=0.1)]
    write_results(Results(variants=[variant("a", 90, 50, epochs=epochs)]), tmp_path / "results.json")
    write_report(tmp_path)
    assert math.isnan(read_results(tmp_path / "results.json").variants[0].epochs[0].loss)


@pytest.mark.parametrize("array", [np.zeros(3), np.array(["a", "b"]), np.array(5), np.full(2, np.inf)])
def test_a_gallery_of_other_arrays_is_broken(array: np.ndarray[Any, Any], run: Path) -> None:
    names = ("clean", "adversarial", "label", "confidence_clean", "confidence_adversarial", "norm")
    write_npz(run / "gallery.npz", dict.fromkeys((*names, "prediction_clean", "prediction_adversarial"), array))
    with pytest.raises(UsageError, match="broken gallery"):
        write_report(run)


def test_a_broken_gallery_is_named_and_the_rest_is_written(run: Path) -> None:
    (run / "gallery.npz").write_bytes(b"PK broken")
    with pytest.raises(UsageError, match="gallery"):
        write_report(run)
    assert "most robust" in (run / "report.html").read_text()


def test_later_keys_are_kept_and_do_no_harm(run: Path) -> None:
    spoil(lambda found: found.update(later=1) or found["variants"][0].update(calibration={"ece": 0.5}))(  # type: ignore[index,func-returns-value]
        run / "results.json"
    )
    (run / "report.html").unlink(missing_ok=True)
    write_report(run)
    assert "most robust" in (run / "report.html").read_text()
    found = read_results(run / "results.json")
    write_results(found, run / "again.json")
    again = json.loads((run / "again.json").read_text())
    assert (again["later"], again["variants"][0]["calibration"]) == (1, {"ece": 0.5})


def test_no_torch_is_imported(run: Path) -> None:
    code = (
        "import sys\nfrom robustkit.cli.group import run\n"
        f"assert run(['report', {str(run)!r}]) == 0\n"
        f"assert run(['compare', {str(run)!r}, {str(run)!r}]) == 0\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_the_verdict_names_the_winner_its_cost_and_the_doubts() -> None:
    rows = [
        variant("baseline", 95, 2),
        variant("robust", 85, 60, gzip=5000),
        variant("pruned", 84, 57, parent="robust"),
    ]
    found = " ".join(verdict(mark_pareto(Results(variants=rows))))
    assert "robust is the most robust: 60.0 % worst case" in found
    assert "10.0 points below baseline" in found
    assert "pruned" in found
    assert "20% of robust's" in found
    wrong = rows[1].model_copy(update={"flags": [Flag(id="P8", severity="wrong", message="nan")]})
    found = " ".join(verdict(mark_pareto(Results(variants=[rows[0], wrong, rows[2]]))))
    assert "pruned is the most robust" in found
    assert "not to be quoted: robust" in found
    joint = rows[2].model_copy(update={"members": ["baseline"]})
    assert "compressed" not in " ".join(verdict(mark_pareto(Results(variants=[*rows[:2], joint]))))
    grown = variant("grown", 90, 65, parent="robust", gzip=9000, sparsity=0.0, bytes=8000)
    assert "compressed" not in " ".join(verdict(mark_pareto(Results(variants=[*rows[:2], grown]))))
    shrunk = variant("shrunk", 80, 50, parent="robust", gzip=900, sparsity=0.0, bytes=2000)
    assert "front is shrunk" in " ".join(verdict(mark_pareto(Results(variants=[*rows[:2], shrunk]))))


def test_the_pareto_front() -> None:
    rows = [
        variant("big-strong", 90, 60, gzip=2000), variant("small-strong", 90, 60, gzip=1000),
        variant("small-weak", 90, 50, gzip=1000), variant("tiny-weak", 90, 50, gzip=500),
    ]  # fmt: skip
    assert [row.pareto for row in mark_pareto(Results(variants=rows)).variants] == [False, True, False, True]


def test_the_schema_document_names_every_key(run: Path) -> None:
    """docs/results-schema.md is what other programs read by."""
    text = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text()
    for record in (Results, VariantResult, GateResult, StepFailure, Flag, EpochRow):
        for name, field in record.model_fields.items():
            assert f"`{field.alias or name}`" in text, (record.__name__, name)
