"""Files for other runtimes: what they answer, what is in them, and when none is written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.cli.group import run as cli
from robustkit.compress.export import agreement, onnx_runner, pt2_runner, to_onnx, to_pt2
from robustkit.data.load import load_dataset
from robustkit.errors import ModelError, UsageError
from robustkit.models.build import build_model
from robustkit.models.vote import Vote
from robustkit.recipe.spec import Use

DIGITS = Use(name="digits", parameters={"limit": 500}, label="digits")


def _saved(path: Path) -> Callable[[Tensor], Tensor]:
    """Read an exported file as another program would."""
    if path.suffix == ".safetensors":
        return robustkit.load(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def _needs(kind: str) -> None:
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


@pytest.mark.parametrize("kind", ["safetensors", "pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_file_answers_as_the_model_whatever_the_batch_and_holds_no_image(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _needs(kind)
    out = tmp_path / "out" / f"slim.{kind}"
    assert cli(["export", str(run), "slim", "--format", kind, "--seed", "4", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seed"], told["images"], told["bytes"]) == (4, 40, out.stat().st_size)
    assert told["largest_difference"] <= 1e-4
    assert [path.name for path in out.parent.iterdir()] == [out.name], "no data beside the file"
    row = next(
        one for one in robustkit.read_results(run / "results.json").variants if (one.name, one.seed) == ("slim", 4)
    )
    assert row.model is not None
    model, saved, data = robustkit.load(run / row.model), _saved(out), load_dataset(DIGITS)
    for count in (1, 3, 70):
        images = data.test.floats(0, count)
        with torch.no_grad():
            torch.testing.assert_close(saved(images), model(images), rtol=0, atol=0 if kind != "onnx" else 1e-4)
    content = out.read_bytes()
    for split in (data.train, data.validation, data.test):
        for image in split.floats(0, 40).numpy():
            assert image.tobytes() not in content
    assert str(Path(robustkit.__file__).parent).encode() not in content, "names folders of this machine"


def test_the_example_inputs_in_a_pt2_file_are_zeros(run: Path, tmp_path: Path) -> None:
    found = robustkit.export(run, "slim", "pt2", out=tmp_path / "model.pt2")
    inputs, _ = torch.export.load(found.path).example_inputs
    assert [tuple(one.shape) for one in inputs] == [(2, 1, 8, 8)]
    assert all(not one.untyped_storage().tolist().count(1) and not one.any() for one in inputs)


@pytest.mark.slow
def test_an_onnx_file_has_a_free_batch_and_everything_inside(run: Path, tmp_path: Path) -> None:
    _needs("onnx")
    import onnx

    proto = onnx.load(str(robustkit.export(run, "slim", "onnx", out=tmp_path / "model.onnx").path))
    onnx.checker.check_model(proto, full_check=True)
    (image,), (logits,) = proto.graph.input, proto.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert [one.dim_value or one.dim_param for one in image.type.tensor_type.shape.dim][1:] == [1, 8, 8]
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert not any(one.external_data for one in proto.graph.initializer)


def test_without_out_the_file_lies_in_the_run_and_the_first_seed_is_taken(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["export", str(run), "slim", "--format", "safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "exports/slim-seed3.safetensors: slim, seed 3" in shown
    assert "predictions equal" in shown
    first = robustkit.read_results(run / "results.json").variants[0].model
    assert first is not None
    assert (run / "exports" / "slim-seed3.safetensors").read_bytes() == (run / first).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-run", "slim", "--format", "pt2"], "no-such-run"),
        (["RUN", "slom", "--format", "pt2"], "did you mean 'slim'?"),
        (["RUN", "zzz", "--format", "pt2"], "; slim"),
        (["RUN", "slim", "--format", "onx"], "did you mean 'onnx'?"),
        (["RUN", "slim", "--format", "pt2", "--seed", "9"], "not made with seed 9; 3, 4"),
        (["RUN", "slim"], "Missing option '--format'"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    arguments: list[str], says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(run) if one == "RUN" else one for one in arguments]
    assert cli(["export", *given, "--out", str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_missing_for_onnx_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "onnxscript" else found(name, *more)
    )
    with pytest.raises(UsageError, match=r"onnxscript.*: pip install 'robustkit\[onnx\]'"):
        robustkit.export(tmp_path, "slim", "onnx")


def test_a_run_that_was_damaged_or_leads_elsewhere_is_refused(run: Path, stored: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    model = copy / stored.relative_to(run)
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelError, match="not as the run left it"):
        robustkit.export(copy, "slim")
    results = json.loads((copy / "results.json").read_text())
    for where, message in (("../elsewhere/model.safetensors", "outside"), (None, "names no model")):
        results["variants"][0]["model"] = where
        (copy / "results.json").write_text(json.dumps(results))
        with pytest.raises(UsageError, match=message):
            robustkit.export(copy, "slim")


def test_code_that_a_run_names_is_not_run_without_trust(run: Path, tmp_path: Path) -> None:
    copy, mark = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(run, copy)
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    'Evil.'\n")
    resolved = json.loads((copy / "resolved.json").read_text())
    resolved["data"] = {"name": f"{tmp_path}/evil.py:Evil", "parameters": {}, "label": "x"}
    (copy / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UsageError, match="--trust-plugins"):
        robustkit.export(copy, "slim")
    assert not mark.exists()


class _Fixed(nn.Module):
    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ([[0.5, 0.25], [0.0, 1.0]], [[0.5, 0.25], [0.0, 1.0]], 0.0),
        ([[0.5, 0.25], [0.0, 1.0]], [[0.5, 0.25], [0.0, 1.00005]], 5e-5),
        ([[0.5, 0.25], [0.0, 1.0]], [[0.5, 0.25], [0.0, 1.0002]], None),
        ([[500.0, 0.25], [0.0, 1.0]], [[500.04, 0.25], [0.0, 1.0]], 8e-5),
        ([[0.5, 0.50001], [0.0, 1.0]], [[0.50001, 0.5], [0.0, 1.0]], None),
        ([[0.5, 0.25], [0.0, 1.0]], [[0.5, 0.25], [0.0, float("nan")]], None),
    ],
    ids=["equal", "close", "apart", "relative", "prediction", "nan"],
)
def test_agreement_is_the_largest_difference_or_an_error(
    ours: list[list[float]], theirs: list[list[float]], difference: float | None
) -> None:
    images = torch.arange(2.0).view(2, 1, 1, 1)
    if difference is None:
        with pytest.raises(ModelError, match="nothing was written"):
            agreement(_Fixed(ours), _Fixed(theirs), images, "x")
    else:
        found = agreement(_Fixed(ours), _Fixed(theirs), images, "x")
        assert found.difference == pytest.approx(difference, abs=1e-6)
        assert found.images == 2


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


def test_a_model_that_cannot_be_traced_is_an_error() -> None:
    with pytest.raises(ModelError, match="cannot be exported"):
        to_pt2(_Branching(), (1, 2, 2))


MODELS: list[tuple[str, tuple[int, int, int], dict[str, object]]] = [
    ("baseline_cnn", (1, 28, 28), {}),
    ("small_cnn", (3, 32, 32), {"widths": [4, 4, 4]}),
    ("resnet18", (3, 32, 32), {"width": 4}),
    ("wide_resnet", (3, 32, 32), {"depth": 10, "width": 1}),
    ("torchvision.mobilenet_v3_small", (1, 64, 64), {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize(("name", "shape", "given"), MODELS, ids=[one[0] for one in MODELS])
def test_every_model_can_be_exported(
    kind: str, name: str, shape: tuple[int, int, int], given: dict[str, object]
) -> None:
    _needs(kind)
    use = Use(name=name, parameters=given, label=name)
    channels = shape[0]
    torch.manual_seed(0)
    model = build_model(use, shape=shape, classes=10, mean=[0.5] * channels, std=[0.25] * channels).eval()
    images = torch.from_numpy(np.random.default_rng(0).random((70, *shape), dtype=np.float32))
    _check(model, shape, images, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_vote_can_be_exported(kind: str) -> None:
    _needs(kind)
    use = Use(name="small_cnn", parameters={"widths": [4, 4]}, label="small_cnn")
    members = [build_model(use, shape=(1, 8, 8), classes=10, mean=[0.5], std=[0.25]).eval() for _ in range(3)]
    _check(Vote(members), (1, 8, 8), torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(0)), kind)


def _check(model: nn.Module, shape: tuple[int, int, int], images: Tensor, kind: str) -> None:
    run = pt2_runner(to_pt2(model, shape)) if kind == "pt2" else onnx_runner(to_onnx(model, shape))
    assert agreement(model, run, images, kind).images == 70
