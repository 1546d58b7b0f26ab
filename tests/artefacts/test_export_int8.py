"""int8 files out of a run: what they answer, what they are calibrated on, and what cannot be asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import robustkit
from robustkit.cli.group import run as cli
from robustkit.compress.export_int8 import as_int8
from robustkit.data.load import load_dataset
from robustkit.data.split import fixed_subset
from robustkit.errors import UsageError
from robustkit.models.onnx_model import OnnxModel
from robustkit.recipe.spec import Use

DIGITS = Use(name="digits", parameters={"limit": 500}, label="digits")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_an_int8_file_is_quantized_on_training_images_and_says_what_that_changed(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ("torchao",):
        pytest.importorskip(package)
    out = tmp_path / f"slim.{kind}"
    assert cli(["export", str(run), "slim", "--format", kind, "--int8", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    data = load_dataset(DIGITS, validation=0.1)
    training = fixed_subset(data.train, 512)
    assert told["int8"]["calibration_images"] == len(training) == 450
    assert told["int8"]["calibration_sha256"] == hashlib.sha256(training.images.numpy().tobytes()).hexdigest()
    row = robustkit.read_results(run / "results.json").variants[0]
    images = fixed_subset(data.test, 40).floats(0, 40)
    model = robustkit.load(run / str(row.model))
    saved = torch.export.load(out).module() if kind == "pt2" else robustkit.load(out)
    with torch.no_grad():
        ours, theirs = model(images).argmax(1), saved(images).argmax(1)
    assert int((ours != theirs).sum()) == told["int8"]["predictions"]
    content = out.read_bytes()
    assert not any(image.tobytes() in content for image in training.floats(0, 100).numpy())
    assert not any(image.tobytes() in content for image in training.images.numpy()[:100] if image.any())


@pytest.mark.slow
def test_the_file_for_robustkit_and_onnx_runtime_says_itself_what_it_is(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    made = robustkit.export(run, "slim", "onnx", int8=True, out=tmp_path / "slim.onnx")
    loaded = robustkit.load(made.path)
    assert isinstance(loaded, OnnxModel)
    assert loaded.made is not None
    assert made.changed is not None
    assert loaded.made.calibration_sha256 == made.changed.calibration_sha256
    assert (
        cli(["attack", str(made.path), "--data", "digits: {limit: 500}", "--examples", "20", "--attacks", "fgsm"]) == 0
    )


def test_what_is_int8_or_a_file_already_is_not_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Given(OnnxModel):
        def __init__(self, made: object) -> None:
            torch.nn.Module.__init__(self)
            self.made = made  # type: ignore[assignment]

    with pytest.raises(UsageError, match="leave --int8 out"):
        as_int8(Given("quantized"), "onnx", torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="float ONNX file"):
        as_int8(Given(None), "onnx", torch.zeros(1, 1, 8, 8))


def test_a_missing_package_for_int8_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "torchao" else found(name, *more)
    )
    out = tmp_path / "x"
    assert cli(["export", str(run), "slim", "--format", "pt2", "--int8", "--out", str(out)]) == 2
    assert "pip install 'robustkit[int8]'" in capsys.readouterr().err
    assert not out.exists()
