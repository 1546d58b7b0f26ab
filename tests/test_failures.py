"""What a step that fails leaves: in the results, in every file of the report, and in the next run."""

from __future__ import annotations

import html
import json
import xml.etree.ElementTree as tree
from pathlib import Path

import pytest

import robustkit
from robustkit import pipeline
from robustkit.cli.group import run as cli
from robustkit.pipeline import RunOutcome
from robustkit.recipe.schema import load_recipe
from robustkit.results import VariantResult

SMALL = """\
name: small
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 1, batch_size: 64}
variants:
  a:
  b: {from: a, compress: [global_l1: {sparsity: 50%}]}
evaluate: {examples: 40, attacks: [noise, 'picky.py:Picky': {as: picky}], latency: false, gallery: 0}
gates: [worst(a) >= 0%, clean(a) >= 0%]
"""
PICKY = '''\
class Picky:
    """Fails on the models that a test names."""

    def __call__(self, model, x, y, threat, *, generator):
        zeros = sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() > 1)
        if {condition}:
            raise RuntimeError("oh dear")
        return x
'''
BREAKS = '''\
from robustkit import Defense


class Breaks(Defense):
    """Fails while a file says so."""

    def penalty(self, batch, forward, step):
        from pathlib import Path

        if Path({mark!r}).exists():
            raise RuntimeError("no luck")
        return batch.x.sum() * 0
'''


def run(folder: Path, text: str = SMALL, condition: str = "False") -> RunOutcome:
    (folder / "picky.py").write_text(PICKY.format(condition=condition))
    path = folder / "small.yaml"
    path.write_text(text)
    return pipeline.run(load_recipe(path), folder / "run", trust_plugins=True, recipe_text=text)


def flags(row: VariantResult) -> dict[str, str]:
    return {flag.id: flag.severity for flag in row.flags}


def test_an_attack_that_fails_is_told_everywhere_and_forgotten_when_it_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, condition="True").results
    assert [(one.variant, one.seed, one.step) for one in found.failures] == [
        ("a", 0, "attack picky"), ("b", 0, "attack picky")
    ]  # fmt: skip
    assert "oh dear" in found.failures[0].message
    assert all(flags(row)["attack-failed"] == "wrong" for row in found.variants)
    assert [gate.verdict.split(" ")[0] for gate in found.gates] == ["fails", "holds"]
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text())["failures"][0]["variant"] == "a"
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "Failed steps" in text
        assert "oh dear" in text
        assert "Steps that failed: a (attack picky), b (attack picky)" in text
    cases = tree.parse(folder / "junit.xml").iter("testcase")
    errors = [case.get("name") for case in cases if case.find("error") is not None]
    assert errors == ["a (attack picky)", "b (attack picky)"]
    assert cli(["report", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "failed: a (attack picky): RuntimeError: oh dear" in shown.err
    assert "Every gate holds" not in shown.out

    found = run(tmp_path).results
    assert not found.failures
    assert not any("attack-failed" in flags(row) for row in found.variants)
    assert found.gates[0].holds
    assert "Failed steps" not in (folder / "report.html").read_text()


def test_worst_cases_over_other_attacks_are_not_compared(tmp_path: Path) -> None:
    found = run(tmp_path, condition="zeros > 50").results
    assert [flags(row).get("attack-failed") for row in found.variants] == [None, "wrong"]
    assert found.variants[1].versus_parent is None
    assert found.gates[0].holds
    assert run(tmp_path).results.variants[1].versus_parent is not None


def test_a_variant_that_fails_is_in_the_report_with_those_made_from_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    (tmp_path / "breaks.py").write_text(BREAKS.format(mark=str(mark)))
    text = SMALL.replace("  a:\n", "  plain:\n  a: {defenses: ['breaks.py:Breaks']}\n")
    found = run(tmp_path, text).results
    assert [row.name for row in found.variants] == ["plain"]
    assert [(one.variant, one.step) for one in found.failures] == [("a", "fit"), ("b", "fit")]
    assert "no luck" in found.failures[0].message
    assert found.failures[1].message == "not made, because a failed"
    assert "b (fit)" in (tmp_path / "run" / "report.html").read_text()
    assert "no luck" in (tmp_path / "run" / "junit.xml").read_text()
    mark.unlink()
    found = run(tmp_path, text).results
    assert [row.name for row in found.variants] == ["plain", "a", "b"]
    assert not found.failures


def test_latency_is_measured_again_when_a_variant_that_failed_is_there(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    (tmp_path / "breaks.py").write_text(BREAKS.format(mark=str(mark)))
    text = SMALL.replace("  a:\n", "  a:\n  late: {defenses: ['breaks.py:Breaks']}\n")
    text = text.replace("latency: false", "latency: true").replace(", 'picky.py:Picky': {as: picky}", "")

    def latencies() -> dict[str, dict[str, float]]:
        return {row.name: row.latency_ms for row in run(tmp_path, text).results.variants}

    first = latencies()
    assert set(first) == {"a", "b"}
    assert all(set(found) == {"batch_1", "batch_256"} for found in first.values())
    assert latencies() == first
    mark.unlink()
    assert all(set(found) == {"batch_1", "batch_256"} for found in latencies().values())
    assert set(latencies()) == {"a", "late", "b"}


def test_a_run_that_finds_all_done_keeps_the_provenance(tmp_path: Path) -> None:
    first = run(tmp_path).results.provenance
    assert first["torch"]["threads"] > 0
    path = tmp_path / "run" / "provenance.json"
    path.write_text(path.read_text().replace('"time": "2', '"time": "1'))
    again = run(tmp_path).results.provenance
    assert again["time"].startswith("1")
    assert again["torch"] == first["torch"]
    path.write_text("[")
    assert run(tmp_path).results.provenance["robustkit"] == first["robustkit"]


def test_the_report_names_the_overrides_of_its_recipe(tmp_path: Path) -> None:
    """Also after a run that found everything done: recipe.yaml is the last run's."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace(", 'picky.py:Picky': {as: picky}", ""))
    arguments = ["run", str(path), "--runs", str(tmp_path), "--quiet", "evaluate.attacks=[noise, fgsm]"]
    assert cli([*arguments, "gates=[clean(a) >= 0%]"]) == 0
    folder = tmp_path / "small"
    overrides = ["evaluate.attacks=[noise, fgsm]", "gates=[clean(a) >= 0%]"]
    assert json.loads((folder / "provenance.json").read_text())["overrides"] == overrides
    again = "robustkit run recipe.yaml 'evaluate.attacks=[noise, fgsm]'"
    assert (
        html.escape(f"{again} 'gates=[clean(a) >= 0%]'", quote=True).replace("&#x27;", "&#39;")
        in (folder / "report.html").read_text()
    )
    assert cli(arguments) == 0
    assert f"    {again}\n" in (folder / "report.md").read_text()
    found = robustkit.run(path, overrides=overrides, runs=tmp_path)
    assert found.provenance["overrides"] == overrides


def test_a_gate_fails_where_a_seed_is_missing(tmp_path: Path) -> None:
    from robustkit.missing import undecided
    from robustkit.recipe.gates import parse_gate
    from robustkit.results import StepFailure

    found = run(tmp_path).results
    assert not undecided(parse_gate("clean(a) >= 0%"), found)
    lost = StepFailure(variant="a", seed=1, step="fit", message="no luck")
    found = found.model_copy(update={"failures": [lost]})
    assert undecided(parse_gate("clean(a) >= 0%"), found)
    assert not undecided(parse_gate("clean(b) >= 0%"), found)
