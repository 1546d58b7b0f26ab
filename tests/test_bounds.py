"""Certificates, corruptions and 8-bit judging as parts of a run: what is written, what runs again, what stops it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustkit
from robustkit.cli.group import run as cli
from robustkit.pipeline import plan_of
from robustkit.recipe.schema import parse_recipe

SMALL = """\
name: small
data: {digits: {limit: 400}}
model: {small_cnn: {widths: [4, 8]}}
threat: {norm: linf, eps: 0.01}
train: {epochs: 4, batch_size: 32}
variants:
  plain:
  pruned: {from: plain, compress: [global_l1: {sparsity: 30%}]}
evaluate:
  examples: 50
  attacks: [fgsm, pgd: {steps: 4}]
  eps_curve: [0, 0.01]
  latency: false
  certify: [interval, randomized_smoothing: {sigma: 0.2, n0: 10, n: 60, as: smooth}]
  corruptions: true
  quantize_input: true
gates: [interval(plain) >= 0%, smooth(plain) >= 0%]
"""
CLAIMS = '''\
from typing import ClassVar

import torch

from robustkit.certificates.certificate import Certified


class Everything:
    """Certifies every example."""

    smoothed: ClassVar[bool] = {smoothed}

    def __call__(self, model, x, y, threat, *, generator):
        return Certified(torch.ones(len(y), dtype=torch.bool), y, torch.ones(len(y)), 0)
'''


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds")
    assert cli(["run", str(write(folder)), "--runs", str(folder), "--quiet"]) == 0
    return folder / "small"


def test_everything_is_in_the_results(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert found["threat"] == {"norm": "linf", "eps": 0.01, "quantize_input": True}
    assert not found["failures"]
    for row in found["variants"]:
        interval, smooth = row["certified"]["interval"], row["certified"]["smooth"]
        assert interval["value"] <= row["worst"]["value"]
        assert interval["n"] == smooth["n"] == 50
        assert not interval["smoothed"]
        assert smooth["smoothed"]
        assert interval["clean"] == row["clean"]
        assert interval["forwards"] == 150
        assert smooth["forwards"] == 70 * 50
        assert 0 <= smooth["abstained"] <= 50
        assert smooth["value"] <= smooth["clean"]["value"]
        with np.load(finished / row["arrays"]) as arrays:
            assert arrays["certified/interval"].mean() == pytest.approx(interval["value"])
            assert not (arrays["certified/interval"] & ~arrays["correct/worst"]).any()
        corruptions = row["corruptions"]
        assert len(corruptions["by"]) == 13
        assert all(len(values) == 5 for values in corruptions["by"].values())
        assert corruptions["mean"]["value"] == pytest.approx(np.mean(list(corruptions["by"].values())), abs=1e-5)
    assert robustkit.read_results(finished / "results.json").variants[0].certified["smooth"].smoothed


def test_the_adversarial_images_are_of_eight_bits(finished: Path) -> None:
    row = robustkit.read_results(finished / "results.json").variants[0]
    assert row.gallery
    with np.load(finished / row.gallery) as arrays:
        levels = 255 * arrays["adversarial"]
    assert np.abs(levels - levels.round()).max() < 1e-3


def test_the_report_shows_them(finished: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (finished / name).read_text()
        for part in ("Certified accuracy", "Common corruptions", "the smoothed classifier", "certified (interval)",
                     "corrupted", "gaussian_noise", "lower bound of robust accuracy"):  # fmt: skip
            assert part in text, (name, part)
    assert "rounded to 8 bits" in (finished / "report.html").read_text()
    assert "rounded to 8 bits" in (finished / "report.md").read_text()
    rows = list(csv.DictReader((finished / "results.csv").read_text().splitlines()))
    results = robustkit.read_results(finished / "results.json")
    for cells, row in zip(rows, results.variants, strict=True):
        assert row.corruptions is not None
        assert float(cells["certified:interval"]) == row.certified["interval"].value
        assert float(cells["corrupted"]) == row.corruptions.mean.value


def test_the_schema_document_names_every_key(finished: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "results-schema.md").read_text()
    known = set(re.findall(r"`(\w+)`", text)) | set(re.findall(r'"(\w+)"', text))
    found = json.loads((finished / "results.json").read_text())
    row = found["variants"][0]
    records = [found["threat"], row, row["corruptions"], *row["certified"].values()]
    assert {key for record in records for key in record} <= known


def test_without_them_nothing_of_them_is_shown(tmp_path: Path) -> None:
    lines = [line for line in SMALL.splitlines() if not line.startswith(("  certify", "  corr", "  quant", "gates"))]
    assert cli(["run", str(write(tmp_path, "\n".join(lines) + "\n")), "--runs", str(tmp_path), "--quiet"]) == 0
    text = (tmp_path / "small" / "report.html").read_text() + (tmp_path / "small" / "report.md").read_text()
    for part in ("Certified", "certified", "corrupted", "8 bits"):
        assert part not in text.replace("".join(lines), "")
    found = json.loads((tmp_path / "small" / "results.json").read_text())
    assert found["threat"] == {"norm": "linf", "eps": 0.01}
    assert found["variants"][0]["certified"] == {}
    assert found["variants"][0]["corruptions"] is None


def kinds(text: str) -> dict[str, tuple[str, str]]:
    return {
        step.key: (step.kind, step.use.label if step.use else "")
        for step in plan_of(parse_recipe(text)).steps
        if step.variant == "plain"
    }


def new(before: str, after: str) -> set[tuple[str, str]]:
    had = kinds(before)
    return {what for key, what in kinds(after).items() if key not in had}


def test_what_runs_again() -> None:
    assert new(SMALL, SMALL.replace("n: 60", "n: 80")) == {("certify", "smooth"), ("soundness", "")}
    assert new(SMALL, SMALL.replace("as: smooth", "as: smoother").replace("smooth(plain)", "smoother(plain)")) == set()
    assert new(SMALL, SMALL.replace("[fgsm, ", "[fgsm, noise, ")) == {("attack", "noise"), ("soundness", "")}
    plain = SMALL.replace("  quantize_input: true\n", "")
    changed = {("attack", "fgsm"), ("attack", "pgd"), ("curve", ""), ("soundness", "")}
    assert new(plain, SMALL) == changed
    assert new(plain, plain.replace("  corruptions: true\n", "")) == set()
    eps = new(SMALL, SMALL.replace("eps: 0.01", "eps: 0.02"))
    assert ("corruptions", "") not in eps
    assert {("certify", "interval"), ("certify", "smooth")} < eps


def lying(folder: Path, smoothed: bool = False) -> Path:
    (folder / "claims.py").write_text(CLAIMS.replace("{smoothed}", str(smoothed)))
    return write(folder, SMALL.replace("certify: [interval,", "certify: ['claims.py:Everything', interval,"))


def test_a_certificate_that_an_attack_breaks_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(lying(tmp_path)), "--runs", str(tmp_path), "--quiet", "--trust-plugins"]
    assert cli(arguments) == 1
    shown = capsys.readouterr().err
    assert re.search(r"failed: plain \(soundness\): internal error: Everything certifies \d+ examples", shown)
    numbers = re.findall(r"that pgd breaks \(numbers in the test data, from 0: ([\d, ]+)", shown)
    found = robustkit.read_results(tmp_path / "small" / "results.json")
    (row,) = found.variants
    assert row.name == "plain", "nothing is run after it"
    assert row.arrays
    with np.load(tmp_path / "small" / row.arrays) as arrays:
        assert not arrays["correct/pgd"][[int(one) for one in numbers[0].strip(", ").split(", ")]].any()
    assert {flag.severity for flag in row.flags if flag.id == "unsound"} == {"wrong"}
    assert [(one.variant, one.step) for one in found.failures] == [("plain", "soundness"), ("pruned", "fit")]
    assert "stopped at an internal error" in found.failures[1].message
    assert "internal error" in (tmp_path / "small" / "report.html").read_text()
    assert cli(arguments) == 1, "it is not forgotten"
    capsys.readouterr()
    lying(tmp_path, smoothed=True)
    assert cli(arguments) == 0, "of the smoothed classifier the attack says nothing"
    assert not robustkit.read_results(tmp_path / "small" / "results.json").failures


def test_a_certificate_that_fails_takes_no_other_figure_with_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    'A layer without bounds.'\n\n"
        "    def __init__(self, shape, classes):\n        super().__init__(nn.Flatten(), nn.LayerNorm(64), "
        "nn.Linear(64, classes))\n"
    )
    path = write(tmp_path, SMALL.replace("{small_cnn: {widths: [4, 8]}}", "'net.py:Net'").replace("gates:", "x: ")
                 .partition("\nx: ")[0] + "\n")  # fmt: skip
    assert cli(["run", str(path), "--runs", str(tmp_path), "--quiet", "--trust-plugins"]) == 1
    found = robustkit.read_results(tmp_path / "small" / "results.json")
    assert [(one.variant, one.step) for one in found.failures] == [
        ("plain", "certify interval"), ("pruned", "certify interval")
    ]  # fmt: skip
    assert "layer 1 is LayerNorm" in found.failures[0].message
    assert [set(row.certified) for row in found.variants] == [{"smooth"}, {"smooth"}]
    assert all(row.corruptions for row in found.variants)


def test_check_shows_and_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["check", str(write(tmp_path)), "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "certificates: interval, randomized_smoothing(sigma=0.2, n0=10, n=60)" in shown
    assert "corruptions: all, at 5 severities" in shown
    assert "rounded to 8 bits" in shown

    def passes(text: str) -> float:
        assert cli(["check", str(write(tmp_path, text)), "--runs", str(tmp_path), "--json"]) == 0
        found: Any = json.loads(capsys.readouterr().out)["variants"][0]["attack_passes"]
        return float(found)

    whole = passes(SMALL)
    assert whole - passes(SMALL.replace("  corruptions: true\n", "")) == 65
    lines = [line for line in SMALL.splitlines() if not line.startswith(("  certify", "gates"))]
    assert whole - passes("\n".join(lines) + "\n") == 3 + 70
