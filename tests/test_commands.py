"""The small commands: list, show, init, schema, env, completion."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from rich.console import Console

from robustkit import registry
from robustkit.cli.group import COMMANDS, cli, run
from robustkit.cli.progress import Display
from robustkit.recipe.schema import load_recipe


def test_list_shows_every_plugin_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list"]) == 0
    shown = capsys.readouterr().out
    for kind in registry.KINDS:
        for name in registry.BUILTIN[kind]:
            assert f"  {name} " in shown
    assert shown.count("torchattacks.") >= 39
    assert run(["list", "attack", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"attack"}
    assert all(found["attack"].values()), [name for name, text in found["attack"].items() if not text]
    assert run(["list", "atack"]) == 2
    assert "did you mean 'attack'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pgd", "n_fgsm", "small_cnn", "global_l1", "torchattacks.Square", "cifar10", "sgd"])
def test_show_explains_one_plugin(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", name]) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert "default" in shown or "required" in shown
    assert run(["show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["parameters"]


def test_show_of_nothing_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "pdg"]) == 2
    assert "'pgd'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nosuch.py:Net", "'nosuch.py:Net': there is no file or module 'nosuch.py'"),
        ("no.such.module:Net", "there is no file or module 'no.such.module'"),
        ("good.py:Net", "good.py defines no 'Net'"),
        ("bad.py:Net", "bad.py:1: not valid Python"),
    ],
)
def test_show_says_why_a_file_or_module_cannot_be_shown(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("class Other: 'Other.'\n")
    (tmp_path / "bad.py").write_text("class (\n")
    assert run(["show", name]) == 2
    shown = capsys.readouterr().err
    assert reason in shown
    assert "there is no plugin" not in shown


def test_init_writes_a_recipe_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert run(["init", str(path)]) == 0
    assert [one.label for one in load_recipe(path).variants] == ["baseline", "robust", "robust-pruned"]
    path.write_text("precious")
    assert run(["init", str(path)]) == 2
    assert path.read_text() == "precious"


def test_schema_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "robustkit recipe"
    assert run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "cache" in found
    assert "torch" in json.dumps(found)
    assert run(["env"]) == 0


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Usage: robustkit " + name in shown
    assert run(["--version"]) == 0
    assert run(["no-such-command"]) == 2
    assert run(["run"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("variable", ["ROBUSTKIT_LIST_JSON", "ROBUSTKIT_LIST_MARKDOWN"])
def test_options_come_from_the_environment(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")
    assert run(["list", "model"]) == 0
    shown = capsys.readouterr().out
    assert "small_cnn" in (json.loads(shown)["model"] if "JSON" in variable else shown)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_the_variable_that_its_name_promises(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in command.params:
        if isinstance(option, click.Option):
            (written,) = [one for one in option.opts if one.startswith("--")]
            variable = f"ROBUSTKIT_{name}_{written[2:]}".upper().replace("-", "_")
            assert variable in (option.envvar, f"ROBUSTKIT_{name}_{option.name}".upper())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from robustkit.cli.group import main; main()"],
        env={**os.environ, "_ROBUSTKIT_COMPLETE": f"{shell}_source"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "_ROBUSTKIT_COMPLETE" in done.stdout


def test_the_plugin_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Else: see the second line of docs/plugins.md."""
    assert run(["list", "--markdown"]) == 0
    text = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    assert text[text.index("## data") :] == capsys.readouterr().out


def test_lines_of_a_run_that_is_piped() -> None:
    text = io.StringIO()
    step = {"variant": "robust", "number": 2, "todo": 9}
    with Display(Console(file=text, force_terminal=False, width=200)) as show:
        show("run", {"name": "tiny", "steps": 12, "todo": 9})
        show("start", {**step, "kind": "fit", "description": "n_fgsm()"})
        epoch = {
            "epoch": 0,
            "epochs": 3,
            "loss": 1.25,
            "train_accuracy": 0.5,
            "clean": 0.75,
            "robust": 0.25,
            "eta": 62.4,
        }
        show("epoch", {**step, **epoch})
        show("guard", {**step, "message": "went back"})
        show("projection", {**step, "seconds": 3.0, "limit": None})
        show("projection", {**step, "seconds": 3700.0, "limit": 60.0})
        show("warning", {**step, "message": "too long"})
        show("done", {**step, "kind": "fit", "seconds": 3})
        show("start", {**step, "kind": "attack", "description": "square"})
        cost = {"passes": 934.0, "seconds": 75.0, "autoattack_passes": 9767.0, "autoattack_seconds": 790.2}
        show("estimate", {**step, **cost})
        show("step", {**step, "step": 1, "steps": 2, "robust": 1})
        show("done", {**step, "kind": "attack", "seconds": 61})
        show("start", {**step, "kind": "curve", "description": "security curve"})
        show("failed", {**step, "message": "oh [dear]"})
        show("a later event", {})
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines == [
        "tiny: 12 steps, 3 done before",
        "robust epoch 1/3 loss 1.250 train 50.0% clean(val) 75.0% robust(val) 25.0% 1:02 left",
        "robust guard: went back",
        "robust training takes about 1:01:40",
        "warning: robust: too long",
        "robust made in 3.0 s",
        "robust attack square: at most 934 passes an example, 1:15 if none is fooled (AutoAttack: 9,767, 13:10)",
        "robust attack square in 1:01",
        "robust failed: oh [dear]",
    ]
