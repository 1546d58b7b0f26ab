"""Whole runs on real digits: what runs again, what survives a kill, what a failure leaves, what the exit code says."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robustkit
from robustkit.cli.group import run as cli
from robustkit.errors import RecipeError, UsageError

TINY = """\
name: tiny
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 2, batch_size: 64, optimizer: {sgd: {lr: 0.1, momentum: 0.9}}}
variants:
  baseline:
  robust: {defenses: [n_fgsm, dropout: {p: 0.1}]}
  pruned:
    from: robust
    compress: [global_l1: {sparsity: 50%, schedule: cubic}]
    train: {epochs: 2}
evaluate:
  examples: 60
  attacks: [noise, fgsm, pgd: {steps: 3}]
  eps_curve: [0, 0.05]
  latency: false
"""


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if line.startswith("{")]


def started(folder: Path, since: int = 0) -> list[tuple[str, str]]:
    return [(one["variant"], one["kind"]) for one in events(folder)[since:] if one["event"] == "start"]


def comparable(folder: Path) -> Any:
    """The results without what a clock or the machine measured."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: cleaned(item)
                for key, item in value.items()
                if "seconds" not in key and key not in ("provenance", "latency", "latency_ms")
            }
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return cleaned(json.loads((folder / "results.json").read_text()))


def write(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert cli(["run", str(write(folder)), "--runs", str(folder), "--quiet"]) == 0
    return folder / "tiny"


def test_a_run_leaves_everything_that_is_promised(undisturbed: Path) -> None:
    for name in ("report.html", "report.md", "results.csv", "results.json", "junit.xml", "events.jsonl", "recipe.yaml"):
        assert (undisturbed / name).stat().st_size > 0, name
    assert list((undisturbed / "figures").glob("*.svg"))
    found = json.loads((undisturbed / "results.json").read_text())
    assert found["schema"] == 1
    assert [row["name"] for row in found["variants"]] == ["baseline", "robust", "pruned"]
    for row in found["variants"]:
        for rate in (row["clean"], row["worst"], *row["attacks"].values()):
            assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
            assert rate["n"] == 60
        assert set(row["attacks"]) == {"noise", "fgsm", "pgd"}
        assert row["worst"]["value"] <= min(rate["value"] for rate in row["attacks"].values())
        assert row["forwards"] > 0
        assert row["backwards"] > 0
        assert row["bytes"] > row["gzip_bytes"] > 0
        assert row["macs"] > 0
        with np.load(undisturbed / row["arrays"]) as arrays:
            everything = np.logical_and.reduce([arrays[f"correct/{label}"] for label in ("clean", *row["attacks"])])
            assert np.array_equal(everything, arrays["correct/worst"])
            assert everything.mean() == pytest.approx(row["worst"]["value"])
    pruned = found["variants"][2]
    assert pruned["parent"] == "robust"
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.002)
    assert pruned["nonzero"] < pruned["parameters"]
    assert pruned["versus_parent"]["low"] <= pruned["versus_parent"]["difference"] <= pruned["versus_parent"]["high"]
    assert robustkit.read_results(undisturbed / "results.json").variants[2].name == "pruned"


def test_the_schema_document_names_every_key_that_is_written(undisturbed: Path) -> None:
    """docs/results-schema.md is what other programs read by."""
    text = (Path(__file__).parents[1] / "docs" / "results-schema.md").read_text()
    known = set(re.findall(r"`(\w+)`", text)) | set(re.findall(r'"(\w+)"', text))
    found = json.loads((undisturbed / "results.json").read_text())
    row = found["variants"][2]
    records = [found, *found["variants"], *found["gates"], *row["epochs"], *row["layers"], *row["curves"], row["clean"]]
    records += [row["versus_parent"], *(flag for one in found["variants"] for flag in one["flags"])]
    assert {key for record in records for key in record} <= known


def test_python_gives_the_numbers_of_the_command_line(undisturbed: Path, tmp_path: Path) -> None:
    found = robustkit.run(TINY, runs=tmp_path)
    assert comparable(tmp_path / "tiny") == comparable(undisturbed)
    assert found.variants[0].clean.n == 60


def test_running_again_does_nothing_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    before = (comparable(tmp_path / "tiny"), len(events(tmp_path / "tiny")))
    begun = time.perf_counter()
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    assert started(tmp_path / "tiny", before[1]) == []
    assert comparable(tmp_path / "tiny") == before[0]
    assert time.perf_counter() - begun < 15


def test_only_what_changed_runs(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"

    def again(text: str) -> list[tuple[str, str]]:
        since = len(events(folder)) if folder.exists() else 0
        assert cli(["run", str(write(tmp_path, text)), "--runs", str(tmp_path), "--quiet"]) == 0
        return started(folder, since)

    again(TINY)
    more = TINY.replace("pgd: {steps: 3}", "pgd: {steps: 3}, pgd: {steps: 5, as: pgd-5}")
    assert again(more) == [("baseline", "attack"), ("robust", "attack"), ("pruned", "attack")]
    renamed = more.replace("robust", "hardened").replace("pgd-5", "strong")
    assert again(renamed) == []
    row = robustkit.read_results(folder / "results.json").variants[1]
    assert (row.name, sorted(row.attacks)) == ("hardened", ["fgsm", "noise", "pgd", "strong"])
    changed = renamed.replace("sparsity: 50%", "sparsity: 60%")
    assert {name for name, _ in again(changed)} == {"pruned"}


def command(path: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "robustkit", "run", str(path), "--runs", str(runs), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1"}


def wait_for(folder: Path, what: Mapping[str, object], process: subprocess.Popen[str], count: int = 1) -> None:
    """Wait until the events hold `count` entries with these values."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "events.jsonl").exists():
            found = [one for one in events(folder) if all(one.get(key) == value for key, value in what.items())]
            if len(found) >= count:
                return
        time.sleep(0.01)
    pytest.fail(f"{what} never happened: {process.communicate()}")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param({"event": "epoch", "variant": "robust", "epoch": 0}, id="between epochs"),
        pytest.param(
            {"event": "start", "variant": "pruned", "kind": "fit"}, id="at a child's start", marks=pytest.mark.slow
        ),
        pytest.param(
            {"event": "start", "variant": "pruned", "kind": "attack"}, id="in an attack", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_run_goes_on_with_the_same_numbers(
    moment: Mapping[str, object], undisturbed: Path, tmp_path: Path
) -> None:
    path = write(tmp_path)
    process = subprocess.Popen(
        command(path, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    wait_for(tmp_path / "tiny", moment, process)
    while moment["event"] == "epoch" and not list(tmp_path.glob("tiny/steps/*/state.pt")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(events(tmp_path / "tiny"))
    assert not (tmp_path / "tiny" / "results.json").exists()
    subprocess.run(command(path, tmp_path, "--quiet"), check=True, env=environment(), timeout=120)
    assert comparable(tmp_path / "tiny") == comparable(undisturbed)
    if moment["event"] == "epoch":
        assert any(one["event"] == "resume" and one["epoch"] >= 1 for one in events(tmp_path / "tiny")[before:])
    assert ("baseline", "fit") not in started(tmp_path / "tiny", before)


@pytest.mark.slow
def test_killed_anywhere_again_and_again(undisturbed: Path, tmp_path: Path) -> None:
    """Kills at random moments until a run comes through."""
    path = write(tmp_path)
    draw = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            command(path, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, env=environment()
        )
        try:
            process.wait(timeout=3.5 + 4 * draw.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            assert process.returncode == 0
            break
    subprocess.run(command(path, tmp_path, "--quiet"), check=True, env=environment(), timeout=120)
    assert comparable(tmp_path / "tiny") == comparable(undisturbed)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes started meanwhile obey SIGINT, also where a shell put the tests into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "SIGTERM"])
def test_a_stopped_run_ends_in_two_seconds_and_says_how_to_go_on(stop: signal.Signals, tmp_path: Path) -> None:
    path = write(tmp_path, TINY.replace("epochs: 2, batch", "epochs: 20_000, batch"))
    with subprocess.Popen(
        command(path, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            wait_for(tmp_path / "tiny", {"event": "epoch"}, process)
            begun = time.monotonic()
            process.send_signal(stop)
            out, err = process.communicate(timeout=10)
            seconds = time.monotonic() - begun
        finally:
            process.kill()
    assert seconds < 2
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert f"robustkit run {path} --runs {tmp_path}" in err


@pytest.mark.parametrize(
    ("device", "count", "says"),
    [
        ("cuda:5", 0, "it sees no cuda device"),
        ("cuda", 0, "it sees no cuda device"),
        ("cuda:2", 2, "it sees 2 of this kind"),
    ],
)
def test_a_device_that_is_not_there_ends_the_run_before_anything_is_loaded(
    device: str,
    count: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    path = write(tmp_path, TINY + f"device: {device}\n")
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert f"device: {device} is not there" in shown
    assert says in shown
    assert "device=cpu" in shown
    assert not any(one["event"] in ("data", "start") for one in events(tmp_path / "tiny"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_gives_models_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TINY.replace("train: {epochs: 2", "train: {compile: true, epochs: 8")
    path = write(tmp_path, text.replace("[n_fgsm, dropout: {p: 0.1}]", "[n_fgsm]"))
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0, capsys.readouterr().err
    found = robustkit.read_results(tmp_path / "tiny" / "results.json")
    assert [row.name for row in found.variants] == ["baseline", "robust", "pruned"]
    # Ten classes; the same without compile gives 48 %, 62 % and 52 %.
    assert min(row.clean.value for row in found.variants) > 0.25
    assert found.variants[2].sparsity == pytest.approx(0.5, abs=0.01)


FAILING = """\
import torch
from robustkit import Defense


class Fails(Defense):
    "Raises in its second step."

    def __init__(self) -> None:
        self.count = 0

    def penalty(self, batch, forward, step):
        self.count += 1
        if self.count > 1:
            raise ZeroDivisionError("oh dear")
"""


def test_one_variant_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    text = TINY.replace("[n_fgsm, dropout: {p: 0.1}]", "['failing.py:Fails']") + "gates: [worst(pruned) >= 10%]\n"
    path = write(tmp_path, text)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 2
    assert "--trust-plugins" in capsys.readouterr().err
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet", "--trust-plugins"]) == 1
    shown = capsys.readouterr()
    assert "failed: robust (fit): ZeroDivisionError: oh dear (failing.py:14)" in shown.err
    assert "Traceback" not in shown.out + shown.err
    found = robustkit.read_results(tmp_path / "tiny" / "results.json")
    assert [row.name for row in found.variants] == ["baseline"]
    assert found.gates[0].verdict == "fails"
    assert any(one["event"] == "trace" and "oh dear" in one["trace"] for one in events(tmp_path / "tiny"))


HOOKED = """
from torch import nn
from torch.nn.utils import prune


class Hooked(nn.Module):
    "Prunes itself."

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_channels, 8, 3), nn.Linear(8 * 36, classes)
        prune.l1_unstructured(self.head, "weight", amount=0.5)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))
"""
HOOKED_RECIPE = """\
name: tiny
data: {digits: {limit: 300}}
model: hooked.py:Hooked
train: {epochs: 1, batch_size: 64}
variants:
  base: {defenses: [dropout: {p: 0.1}]}
  tuned: {from: base, train: {epochs: 1}}
  pruned: {from: base, compress: [global_l1: {sparsity: 80%}], train: {epochs: 1}}
evaluate: {examples: 20, attacks: [noise], latency: false}
"""


def test_a_model_that_prunes_itself_is_pruned_further(tmp_path: Path) -> None:
    (tmp_path / "hooked.py").write_text(HOOKED)
    path = write(tmp_path, HOOKED_RECIPE)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet", "--trust-plugins"]) == 0
    base, tuned, pruned = robustkit.read_results(tmp_path / "tiny" / "results.json").variants
    total = 8 * 9 + 10 * 8 * 36
    assert base.sparsity == pytest.approx(10 * 8 * 36 / 2 / total)
    assert tuned.sparsity == base.sparsity
    assert pruned.sparsity == pytest.approx(0.8, abs=1 / total)
    assert base.parameters == total + 18


STOPS = """
from robustkit import Defense
from robustkit.train.hooks import Decision


class Stops(Defense):
    "Stops after an epoch."

    def after_epoch(self, report):
        return Decision.STOP
"""
STOPS_RECIPE = """\
name: tiny
data: {digits: {limit: 300}}
model: {small_cnn: {widths: [4, 8]}}
train: {epochs: 9, batch_size: 64}
variants:
  base: {defenses: ["stops.py:Stops"]}
  pruned: {from: base, compress: [global_l1: {sparsity: 50%, schedule: cubic}], train: {epochs: 9}}
evaluate: {examples: 20, attacks: [noise], latency: false}
"""


def test_a_variant_whose_training_is_stopped_is_as_sparse_as_asked_and_flagged(tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    path = write(tmp_path, STOPS_RECIPE)
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet", "--trust-plugins"]) == 0
    base, pruned = robustkit.read_results(tmp_path / "tiny" / "results.json").variants
    assert pruned.sparsity == pytest.approx(0.5, abs=0.002)
    assert "pruned-after-training" in [flag.id for flag in pruned.flags]
    assert "pruned-after-training" not in [flag.id for flag in base.flags]


def test_a_child_keeps_the_zeros_of_its_pruned_parent(tmp_path: Path) -> None:
    text = TINY.replace("train: {epochs: 2}\n", "train: {epochs: 1}\n")
    text = text.replace("evaluate:\n", "  tuned: {from: pruned, train: {epochs: 1}}\nevaluate:\n")
    assert cli(["run", str(write(tmp_path, text)), "--runs", str(tmp_path), "--quiet"]) == 0
    rows = {row.name: row for row in robustkit.read_results(tmp_path / "tiny" / "results.json").variants}
    assert rows["tuned"].sparsity == pytest.approx(0.5, abs=0.002)


def test_gates_decide_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, TINY + "gates: [clean(baseline) >= 1%]\n")
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    path = write(tmp_path, TINY + "gates: [clean(baseline) >= 1%, clean(baseline) >= worst(baseline) + 99pp]\n")
    capsys.readouterr()
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 3
    assert "gate fails: clean(baseline) >= worst(baseline) + 99pp" in capsys.readouterr().out
    junit = (tmp_path / "tiny" / "junit.xml").read_text()
    assert "<failure" in junit


def test_several_seeds_give_a_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    arguments = ["run", str(path), "seed=[0, 1]", "train.epochs=1", "variants.pruned.train.epochs=1"]
    assert cli([*arguments, "--runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["seed"]) for row in found["variants"]].count(("baseline", 1)) == 1
    assert len(found["variants"]) == 6
    assert cli(["report", str(tmp_path / "tiny")]) == 0
    assert "mean of 2 seeds" in capsys.readouterr().out


def test_piped_output_is_plain(undisturbed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "robustkit", "report", str(undisturbed)], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout
    assert "baseline" in done.stdout
    assert done.stdout.rstrip().endswith("report.html")


def test_fresh_forgets_a_run_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, TINY[: TINY.index("  robust:")] + TINY[TINY.index("evaluate:") :])
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet"]) == 0
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet", "--fresh"]) == 0
    assert ("baseline", "fit") in started(tmp_path / "tiny")
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    assert cli(["run", str(path), "--runs", str(tmp_path), "--name", "mine", "--fresh"]) == 2
    assert precious.read_text() == "years of work"


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    from robustkit.store import Store

    with Store(tmp_path / "tiny").lock(), pytest.raises(UsageError, match="in use"):
        robustkit.run(TINY, runs=tmp_path)


def test_a_broken_step_is_done_again(tmp_path: Path, undisturbed: Path) -> None:
    robustkit.run(TINY, runs=tmp_path)
    folder = tmp_path / "tiny"
    for number, path in enumerate(sorted(folder.glob("steps/*/*"))):
        if path.suffix in (".npz", ".safetensors", ".json") and number % 3 == 0:
            path.write_bytes(path.read_bytes()[:20])
    robustkit.run(TINY, runs=tmp_path)
    assert comparable(folder) == comparable(undisturbed)


def test_check_shows_the_tree_and_what_is_left(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(undisturbed.parent)
    assert cli(["check", str(path), "--runs", str(undisturbed.parent)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[done before]") == 3
    assert shown.index("robust") < shown.index("pruned")
    assert "passes over" in shown
    arguments = ["check", str(path), "variants.pruned.train.epochs=5", "--runs", str(undisturbed.parent), "--json"]
    assert cli(arguments) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["variants"]}
    assert rows["robust"]["to_run"] == 0
    assert rows["pruned"]["to_run"] > 0


def test_compare_lays_runs_side_by_side(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robustkit.run(TINY.replace("epochs: 2, batch", "epochs: 1, batch"), runs=tmp_path)
    assert cli(["compare", str(undisturbed), str(tmp_path / "tiny"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    assert all(row["difference"] is None for row in rows[:3]) or any(row["difference"] for row in rows)
    assert cli(["compare", str(undisturbed)]) == 2
    assert cli(["compare", str(undisturbed), str(tmp_path / "nowhere")]) == 2


def test_mistakes_from_python_are_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean"):
        robustkit.run(TINY.replace("n_fgsm", "n_fsgm"), runs=tmp_path)
    with pytest.raises(RecipeError):
        robustkit.run(tmp_path / "nowhere.yaml")


def test_the_test_images_are_those_of_every_variant(undisturbed: Path) -> None:
    labels = []
    for path in sorted(undisturbed.glob("arrays/*-seed0.npz")):
        with np.load(path) as arrays:
            labels.append(arrays["labels"])
    assert len(labels) == 3
    assert all(np.array_equal(labels[0], other) for other in labels)


CUSTOM = Path(__file__).parents[1] / "recipes" / "custom-defense"


def test_the_recipe_with_a_defense_of_ones_own(tmp_path: Path) -> None:
    (recipe,) = CUSTOM.glob("*.yaml")
    source = (CUSTOM / "input_gradient.py").read_text()
    code = source[source.index("class ") :]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    arguments = ["run", str(recipe), "train.epochs=1", "evaluate.examples=50", "evaluate.latency=false"]
    assert cli([*arguments, "--runs", str(tmp_path), "--quiet"]) == 2
    assert cli([*arguments, "--runs", str(tmp_path), "--quiet", "--trust-plugins"]) in (0, 3)
