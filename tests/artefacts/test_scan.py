"""`robustkit sensitivity` on a run: the table, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import robustkit
from robustkit.cli.group import run as cli
from robustkit.compress.layer_curves import Sensitivity
from robustkit.report.sensitivity import table
from robustkit.run_folder import data_of, recipe_of


def test_a_variant_is_scanned_on_its_validation_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["sensitivity", str(run), "slim", "--sparsities", "50%,0.9", "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    path = run / "sensitivity" / "slim-seed3-global_l1.json"
    found = Sensitivity.model_validate_json(path.read_bytes())
    assert table(found) in shown
    assert all(path.with_suffix(kind).is_file() for kind in (".svg", ".png"))
    assert str(path.with_suffix(".png").name) in shown
    assert (found.sparsities, found.threat) == ([0.5, 0.9], {"norm": "linf", "eps": 0.05})
    row = robustkit.read_results(run / "results.json").variants[0]
    assert [(one.name, one.size) for one in found.layers] == [(one.name, one.size) for one in row.layers]
    assert row.model is not None
    validation = data_of(recipe_of(run), "slim", False).validation
    assert found.clean.n == len(validation) == 50
    right = robustkit.load(run / row.model)(validation.floats(0, 50)).argmax(1) == validation.labels
    assert found.clean.value == pytest.approx(float(right.float().mean()))


def test_channels_of_the_second_seed_into_a_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--method", "channel_l2", "--seed", "4", "--out", str(tmp_path), "--examples", "10", "--steps", "1"]
    assert cli(["sensitivity", str(run), "slim", *given, "--sparsities", "50%", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["clean"]["n"]) == ("channel_l2", 10)
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        f"slim-seed4-channel_l2.{kind}" for kind in ("json", "png", "svg")
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["slom"], "did you mean 'slim'"),
        (["slim", "--sparsities", "50,90"], "50%,80%,90%"),
        (["slim", "--method", "magic"], "'magic' cannot be scanned"),
        (["slim", "--seed", "9"], "not made with seed 9"),
    ],
)
def test_mistakes_are_said(run: Path, given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["sensitivity", str(run), *given]) == 2
    assert says in capsys.readouterr().err
