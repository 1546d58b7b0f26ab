"""`robustkit attack`: the figures of `robustkit.evaluate`, from files of every kind, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import robustkit
from robustkit.cli.group import run as cli
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, fixed_subset
from robustkit.models.normalized import Normalized
from robustkit.recipe.spec import Use

FAST = ["--threat", "linf:0.05", "--attacks", "fgsm, pgd: {steps: 2}", "--examples", "60"]
NET = "own.py:Net"
OWN = """
import pathlib
from torch import nn

pathlib.Path("ran").touch()


class Net(nn.Sequential):
    "One layer."

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, classes))
"""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(Use(name="digits", label="digits"))


@pytest.fixture
def linear(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """The nearest class mean as a layer, in a folder with its class and its state dict."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    images = digits.train.floats(0, len(digits.train)).sub_(digits.mean[0]).div_(digits.std[0]).flatten(1)
    means = torch.stack([images[digits.train.labels == label].mean(0) for label in range(10)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.copy_(means)
        net[1].bias.copy_(-means.square().sum(1) / 2)
    torch.save(net.state_dict(), "net.pt")
    return net


def answered(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli(["attack", *arguments, "--json"])
    shown = capsys.readouterr()
    assert shown.out, shown.err
    found: dict[str, Any] = json.loads(shown.out)
    return code, found


def expected(model: nn.Module, digits: Dataset) -> robustkit.evaluation.api.Evaluation:  # type: ignore[name-defined]
    test = fixed_subset(digits.test, 60)
    threat = robustkit.Threat("linf", 0.05)
    return robustkit.evaluate(model, test.images, test.labels, threat=threat, attacks=["fgsm", {"pgd": {"steps": 2}}])


def same(found: dict[str, Any], wanted: Any) -> None:
    assert found["clean"] == wanted.clean.model_dump()
    assert found["worst"] == wanted.worst.model_dump()
    assert found["attacks"] == {label: rate.model_dump() for label, rate in wanted.attacks.items()}
    assert found["flags"] == [flag.model_dump() for flag in wanted.flags]


def test_a_model_of_a_run_has_the_figures_that_evaluate_gives(
    stored: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected(robustkit.load(stored), digits)
    code, found = answered([str(stored), "--data", "digits", *FAST], capsys)
    same(found, wanted)
    assert found["threat"] == {"norm": "linf", "eps": 0.05}
    assert code == int(any(flag.severity == "wrong" for flag in wanted.flags))


def test_a_state_dict_is_normalized_by_the_training_images_or_by_what_is_given(
    linear: nn.Sequential, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["net.pt", "--data", "digits", "--model", NET, "--trust-plugins", *FAST]
    code, found = answered(given, capsys)
    assert code == 0
    assert found["clean"]["value"] > 0.8
    same(found, expected(Normalized(linear, digits.mean, digits.std).eval(), digits))
    _, other = answered([*given, "--mean", "0.9", "--std", "0.2"], capsys)
    same(other, expected(Normalized(linear, [0.9], [0.2]).eval(), digits))
    assert other["attacks"] != found["attacks"]


def test_a_model_that_torch_pruned_is_attacked_with_its_zeros(
    linear: nn.Sequential, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    prune.l1_unstructured(linear[1], "weight", 0.7)
    torch.save({"epoch": 3, "state_dict": linear.state_dict()}, "pruned.pth")
    code, found = answered(["pruned.pth", "--data", "digits", "--model", NET, "--trust-plugins", *FAST], capsys)
    prune.remove(linear[1], "weight")
    assert code == 0
    same(found, expected(Normalized(linear, digits.mean, digits.std).eval(), digits))


def test_folders_and_npz_files_are_data(
    linear: nn.Sequential, digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for name, split in (("train", digits.train), ("test", digits.test)):
        for number, (image, label) in enumerate(zip(split.images[:120], split.labels[:120].tolist(), strict=True)):
            place = tmp_path / "images" / name / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{number:03}.png")
    arrays = {}
    for name, split in (("train", digits.train), ("test", digits.test)):
        arrays[f"x_{name}"], arrays[f"y_{name}"] = split.images[:120].numpy(), split.labels[:120].numpy()
    np.savez(tmp_path / "digits.npz", **arrays)
    common = ["--model", NET, "--trust-plugins", "--mean", "0.3", "--std", "0.4", "--attacks", "fgsm"]
    figures = [answered(["net.pt", "--data", data, *common], capsys)[1] for data in ("images", "digits.npz")]
    assert figures[0]["clean"]["n"] == 120
    assert figures[0]["clean"] == figures[1]["clean"]
    assert figures[0]["worst"] == figures[1]["worst"]


def test_what_is_printed_for_a_reader(linear: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["attack", "net.pt", "--data", "digits", "--model", NET, "--trust-plugins", *FAST]) == 0
    shown = capsys.readouterr().out
    assert "accuracy of 60 examples, linf eps 0.05, 95 % intervals" in shown
    assert "  pgd" in shown
    assert "stay right" in shown.splitlines()[-1]


def test_wrong_figures_give_exit_code_1(
    linear: nn.Sequential, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head of zeros is right for one class in ten, and has no gradient."""
    torch.save({name: value * 0 for name, value in linear.state_dict().items()}, "zeros.pt")
    given = ["zeros.pt", "--data", "digits", "--model", NET, "--trust-plugins", *FAST]
    assert cli(["attack", *given]) == 1
    assert "no better than chance without an attack: check" in capsys.readouterr().err
    code, found = answered(given, capsys)
    assert code == 1
    assert found["verdict"].startswith("Not to be quoted (")
    assert any(flag["severity"] == "wrong" for flag in found["flags"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nope.pt", "--data", "digits", "--model", "small_cnn"], 1, "nope.pt: there is no such file"),
        (["nope.safetensors", "--data", "digits"], 1, "there is no such file"),
        (["net.pt", "--data", "digits"], 2, "holds no architecture: name it"),
        (["net.pt", "--data", "digits", "--model", "small_cnn"], 1, "does not fit small_cnn for 10 classes"),
        (["net.pt", "--data", "digits", "--model", "small_cn"], 2, "did you mean 'small_cnn'"),
        (["net.pt", "--data", "digitz", "--model", "small_cnn"], 2, "did you mean 'digits'"),
        (["net.pt", "--data", "digits: {sise: 8}", "--model", "small_cnn"], 2, "did you mean 'size'"),
        (["net.pt", "--data", "digits", "--model", NET], 2, "own.py:Net is code"),
        (["net.pt", "--data", "own.py:Net", "--model", "small_cnn"], 2, "own.py:Net is code"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--threat", "linf:8"], 2, "did you mean 8/255?"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--threat", "8/255"], 2, "norm:eps"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--threat", "li:8/255"], 2, "'linf'"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--attacks", "fgsn"], 2, "did you mean 'fgsm'"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--attacks", "ddn"], 2, "the threat is linf"),
        (
            ["net.pt", "--data", "digits", "--model", "small_cnn", "--attacks", "fgsm,fgsm"],
            2,
            "two uses with the label",
        ),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--mean", "0.5"], 2, "given together"),
        (["net.pt", "--data", "digits", "--model", "small_cnn", "--mean", "x", "--std", "1"], 2, "1 numbers"),
        (["MODEL", "--data", "digits", "--model", "small_cnn"], 2, "says itself what it is"),
        (["MODEL", "--data", "digits: {size: 16}"], 1, "takes images (1, 8, 8), the data have (1, 16, 16)"),
    ],
)
def test_a_mistake_is_told(
    arguments: list[str], code: int, says: str, linear: nn.Sequential, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["attack", *(str(stored) if one == "MODEL" else one for one in arguments)]) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert "Traceback" not in shown
    assert not Path("ran").exists(), "code was run without trust"
