"""Whole runs with teachers: what a student starts from, what it learns from, and what a lost teacher takes with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robustkit
from robustkit.cli.group import run as cli
from robustkit.defenses.adversarial import Trades
from robustkit.errors import UsageError
from robustkit.pipeline import Events, plan_of
from robustkit.recipe.plan import Step
from robustkit.recipe.schema import parse_recipe
from robustkit.steps import fit
from robustkit.steps.teach import teach
from robustkit.store import EventLog, Store
from robustkit.workbench import Workbench

TEXT = """\
name: taught
data: {digits: {limit: 200}}
model: {small_cnn: {widths: [4]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 1, batch_size: 64, optimizer: {sgd: {lr: 0.05}}}
variants:
  student: {defenses: [distill: {weight: 1}], teacher: big}
  big: {model: {small_cnn: {widths: [8, 8]}}}
  fine: {from: student, teacher: student, train: {}, defenses: [rslad: {steps: 1}]}
evaluate: {examples: 20, attacks: [noise], latency: false}
"""
Weights = dict[str, Tensor]


@dataclass
class Seen:
    """A run's folder, and by step key the weights that trainings began with and those of their teachers."""

    folder: Path
    begun: dict[str, Weights] = field(default_factory=dict)
    teachers: dict[str, list[Weights]] = field(default_factory=dict)

    def stored(self, key: str) -> Weights:
        return robustkit.load(self.folder / "steps" / key / "model.safetensors").state_dict()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    runs = tmp_path_factory.mktemp("teachers")
    found, real = Seen(runs / "taught"), fit.fit

    def spy(model: Any, data: Any, spec: Any, defenses: Any, **settings: Any) -> Any:
        key = settings["key"]
        found.begun[key] = {name: value.clone() for name, value in model.state_dict().items()}
        seats = [defense._seat for _, defense in defenses if hasattr(defense, "_seat")]
        found.teachers[key] = [seat.taken._model.state_dict() for seat in seats]
        return real(model, data, spec, defenses, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fit", spy)
        robustkit.run(TEXT, runs=runs)
    return found


def same(first: Weights, second: Weights) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_trains_the_teacher_first_and_says_who_taught(seen: Seen) -> None:
    rows = {row.name: row for row in robustkit.read_results(seen.folder / "results.json").variants}
    assert set(rows) == {"big", "student", "fine"}
    assert rows["student"].method == "distill(weight=1), teacher big"
    assert rows["student"].parent is None
    assert {name: row.teacher for name, row in rows.items()} == {"big": None, "student": "big", "fine": "student"}
    assert rows["fine"].parent == "student"
    lines = [json.loads(line) for line in (seen.folder / "events.jsonl").read_text().splitlines()]
    made = [line["variant"] for line in lines if line["event"] == "start" and line["kind"] == "fit"]
    assert made == ["big", "student", "fine"]


def test_weights_come_from_the_parent_and_answers_from_the_teacher(seen: Seen) -> None:
    keys = {label: key for (label, _), key in plan_of(parse_recipe(TEXT)).fit_keys.items()}
    big, student, fine = (keys[label] for label in ("big", "student", "fine"))
    assert seen.teachers[big] == []
    assert same(seen.teachers[student][0], seen.stored(big))
    assert list(seen.begun[student]) == list(seen.stored(student)) != list(seen.stored(big))
    assert same(seen.teachers[fine][0], seen.stored(student))
    assert same(seen.begun[fine], seen.stored(student))
    assert not same(seen.stored(fine), seen.stored(student))


def test_a_teacher_that_fails_takes_its_students_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "class Bad(Defense):\n    def prepare_model(self, model): raise ValueError('no')\n"
    (tmp_path / "bad.py").write_text(f"from robustkit import Defense\n{bad}")
    path = tmp_path / "recipe.yaml"
    text = TEXT.replace("{model: {small_cnn: {widths: [8, 8]}}}", "{defenses: ['bad.py:Bad']}")
    path.write_text(text.replace("variants:\n", "variants:\n  alone:\n"))
    assert cli(["run", str(path), "--runs", str(tmp_path), "--trust-plugins", "--quiet"]) == 1
    shown = "".join(capsys.readouterr())
    assert "not made, because big failed" in shown
    assert "not made, because student failed" in shown


def test_what_a_source_hides_is_seen_before_the_training(tmp_path: Path) -> None:
    hidden = "class Hidden(Defense): pass\nsetattr(Hidden, 'take_teacher', lambda self, teacher: None)\n"
    (tmp_path / "hidden.py").write_text(f"from robustkit import Defense\n{hidden}")
    head, tail = TEXT[: TEXT.index("variants:")], TEXT[TEXT.index("evaluate:") :]
    vote = "  vote: {defenses: [partition_ensemble: {parts: 2}, 'hidden.py:Hidden']}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{head}variants:\n  alone: {{defenses: ['hidden.py:Hidden']}}\n{vote}{tail}")
    with pytest.raises(robustkit.RobustkitError) as caught:
        robustkit.run(path, runs=tmp_path)
    assert "alone: hidden.py:Hidden learns from a teacher; add `teacher:`" in str(caught.value)
    assert "vote: members of a vote cannot share a teacher" in str(caught.value)


def test_a_teacher_that_no_class_learns_from_is_seen_before_the_training(seen: Seen) -> None:
    step = Step("fit", "key", "a", 0, ("other",), teacher="other")
    log = EventLog(seen.folder / "log")
    bench = Workbench(plan_of(parse_recipe(TEXT)), Store(seen.folder), Events(log, None))
    with pytest.raises(UsageError, match="a: no defense learns from its teacher"):
        teach(bench, step, [("trades#1", Trades())])
    log.close()
