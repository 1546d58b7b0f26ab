"""The command line: quick help, exit codes, messages instead of traces."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robustkit.cli.group import COMMANDS, run


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["check", "--help"], ["list"], ["attack", "--help"], ["export", "--help"]],
)
def test_no_torch_is_imported_by(arguments: list[str]) -> None:
    done = _python(
        "import sys; from robustkit.cli.group import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_a_fifth_of_a_second() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "robustkit", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    def bare() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) - min(bare() for _ in range(5)) < 0.2


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert run([name, "--help"]) == 0
        assert "Usage: robustkit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
        (["run", "no-such-recipe.yaml"], 2, "no-such-recipe.yaml"),
        (["check", "no-such-recipe.yaml"], 2, "no-such-recipe.yaml"),
        (["report", "no-such-run"], 2, "no-such-run"),
        (["init", "/dev/null/x.yaml"], 1, "/dev/null/x.yaml: cannot be written: /dev/null is not a folder"),
        (["init", "/proc/nope/x.yaml"], 1, "/proc/nope/x.yaml: cannot be written"),
        (["run", "recipes/quickstart.yaml", "--runs", "/dev/null"], 2, "/dev/null/quickstart: cannot be the folder"),
        (["run", "recipes/quickstart.yaml", "--runs", "/proc/nope"], 2, "/proc/nope/quickstart: cannot be the folder"),
    ],
)
def test_a_mistake_gives_a_message_and_a_code(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert says in shown.err + shown.out
    assert "Traceback" not in shown.err + shown.out


def test_an_error_of_the_system_names_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/run/events.jsonl")

    monkeypatch.setattr("robustkit.cli.init.write_atomic", full)
    assert run(["init", "no-such-folder/recipe.yaml"]) == 1
    assert capsys.readouterr().err == "error: /data/run/events.jsonl: No space left on device\n"


def test_an_unsafe_recipe_needs_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from robustkit.train.hooks import Defense\nclass Mine(Defense):\n    '''Mine.'''\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: digits\nmodel: {small_cnn: {widths: [4, 4, 4]}}\ntrain: {epochs: 1}\n"
        "variants: {a: {defenses: ['mine.py:Mine']}}\n"
    )
    assert run(["check", str(recipe)]) == 0
    assert run(["run", str(recipe), "--runs", str(tmp_path / "runs")]) == 2
    assert "--trust-plugins" in capsys.readouterr().err
    assert not mark.exists()


def test_check_runs_a_data_source_of_yours_only_with_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "src.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "class Mine:\n    'Mine.'\n    size = limit = None\n    def fingerprint(self):\n        return 'mine'\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: 'src.py:Mine'\nmodel: small_cnn\nvariants: {a: }\n")
    command = ["check", str(recipe), "--runs", str(tmp_path / "runs")]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "a: standard training" in shown
    assert "[not known]" in shown
    assert "--trust-plugins" in shown
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"][0]["to_run"] is None
    assert "src.py:Mine" in found["data_note"]
    assert not mark.exists(), "check ran the file"
    assert run([*command, "--trust-plugins"]) == 0
    assert "to run]" in capsys.readouterr().out
    assert mark.exists()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_check_downloads_nothing(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{{name}: {{root: data, download: true}}}}\nmodel: small_cnn\nvariants: {{a: }}\n")
    done = _python(
        "import sys; from robustkit.cli.group import run\n"
        f"code = run(['check', {str(recipe)!r}])\n"
        "heavy = {'torch', 'torchvision'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    assert done.returncode == 0, done.stderr
    assert "[data to be downloaded]" in done.stdout
    assert "a run downloads it there" in done.stdout
    assert not (tmp_path / "data").exists()
    recipe.write_text(recipe.read_text().replace(", download: true", ""))
    done = _python(f"from robustkit.cli.group import main\nmain(['check', {str(recipe)!r}])")
    assert done.returncode == 1
    assert "`download: true`" in done.stderr
