"""ONNX files as variants: what they hold, that PyTorch and ONNX Runtime agree, and what attacks them."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustkit
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.certificates.interval import interval_margins
from robustkit.cli.group import run as cli
from robustkit.compress.onnx_artefact import as_int8_onnx, as_onnx, view_differences
from robustkit.compress.onnx_int8 import to_int8
from robustkit.data.load import load_dataset
from robustkit.data.split import split_of
from robustkit.errors import ModelError, RecipeError, UsageError
from robustkit.evaluation.artefact_rules import surrogate_flags
from robustkit.evaluation.both import on_view
from robustkit.models.artefact import load_model, read_architecture, save_model
from robustkit.models.build import build_model
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.onnx_ops import OPERATIONS, dequantize, quantize
from robustkit.recipe.plan import Step
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import ThreatSpec, Use
from robustkit.results import Flag
from robustkit.steps.last import best_and_last

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CLASSES = [str(number) for number in range(10)]


def small(name: str = "small_cnn", shape: tuple[int, int, int] = (1, 8, 8), **given: object) -> tuple[nn.Module, Use]:
    torch.manual_seed(0)
    use = Use(name=name, parameters=given, label=name)
    channels = shape[0]
    model = build_model(use, shape=shape, classes=10, mean=[0.5] * channels, std=[0.25] * channels)
    with torch.no_grad():
        # Statistics of batch norm that are not those of a new layer.
        for _ in range(3):
            model(torch.rand(16, *shape))
    return model.eval(), use


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Tensor]:
    """A model and images."""
    model, _ = small(widths=[6, 8])
    return model.requires_grad_(False), torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def file(pair: tuple[nn.Module, Tensor]) -> OnnxModel:
    """The model as a float file."""
    return as_onnx(*pair)


@pytest.fixture(scope="module")
def int8(pair: tuple[nn.Module, Tensor]) -> OnnxModel:
    """The model as a quantized file."""
    return as_int8_onnx(*pair)


# What an operation of ONNX gives in ONNX Runtime, beside ours: inputs by shape, constants by value.
X, SIDE = [2, 3, 8, 8], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
CASES: list[tuple[str, dict[str, object], list[np.ndarray]]] = [  # type: ignore[type-arg]
    ("Conv", {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1]}, [np.random.default_rng(0).random((4, 3, 3, 3))]),
    (
        "Conv",
        {"kernel_shape": [3, 3], "group": 3, "dilations": [2, 2]},
        [np.random.default_rng(0).random((6, 1, 3, 3))],
    ),
    ("MaxPool", SIDE, []),
    ("AveragePool", SIDE, []),
    ("AveragePool", {**SIDE, "count_include_pad": 1}, []),
    ("GlobalAveragePool", {}, []),
    ("ReduceMean", {"keepdims": 0}, [np.array([2, 3])]),
    ("ReduceMax", {}, [np.array([1])]),
    ("Reshape", {}, [np.array([0, -1])]),
    ("Flatten", {"axis": 2}, []),
    ("Transpose", {"perm": [0, 2, 3, 1]}, []),
    ("Concat", {"axis": 0}, [np.ones((1, 3, 8, 8))]),
    ("Clip", {}, [np.array(0.2), np.array(0.7)]),
    ("HardSigmoid", {"alpha": 0.3}, []),
    ("HardSwish", {}, []),
    ("Gelu", {"approximate": "tanh"}, []),
    ("Softmax", {"axis": 1}, []),
    (
        "BatchNormalization",
        {"epsilon": 0.01},
        [np.array([1.0, 2, 3]), np.ones(3), np.array([0.1, 0.2, 0.3]), np.array([1.0, 2, 4])],
    ),
]


@pytest.mark.parametrize(("kind", "given", "constants"), CASES, ids=[f"{one[0]}-{n}" for n, one in enumerate(CASES)])
def test_operations_are_those_of_onnx_runtime(kind: str, given: dict[str, object], constants: list[np.ndarray]) -> None:  # type: ignore[type-arg]
    arrays = [one.astype(np.int64 if one.dtype.kind == "i" else np.float32) for one in constants]
    names = [f"c{number}" for number in range(len(arrays))]
    node = helper.make_node(kind, ["x", *names], ["y"], **given)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal(X).astype(np.float32)
    (wanted,) = session.run(None, {"x": x})
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    found = OPERATIONS[kind](attributes, [torch.from_numpy(x), *map(torch.from_numpy, arrays)])
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


def test_rounding_is_onnx_runtimes_and_its_gradient_the_identity() -> None:
    scale, zero = torch.tensor(0.1), torch.tensor(100, dtype=torch.uint8)
    x = torch.tensor([-20.0, -0.05, 0.0, 0.149, 0.25, 3.0, 99.0], requires_grad=True)
    found = dequantize({}, [quantize({}, [x, scale, zero]), scale, zero])
    grid = torch.tensor([0.0, 100, 100, 101, 102, 130, 255])
    torch.testing.assert_close(found, (grid - 100) * 0.1)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(7)), "also where values were clipped"  # type: ignore[arg-type]
    weight = torch.tensor([[10, -4], [3, 7]], dtype=torch.int8)
    per_channel = dequantize({"axis": 0}, [weight, torch.tensor([0.5, 2.0]), torch.zeros(2, dtype=torch.int8)])
    assert torch.equal(per_channel, torch.tensor([[5.0, -2.0], [6.0, 14.0]]))


@pytest.mark.slow
def test_a_file_answers_as_the_model_and_its_view_has_the_models_gradients(
    pair: tuple[nn.Module, Tensor], file: OnnxModel
) -> None:
    (model, images), made = pair, file
    assert made.made is None
    torch.testing.assert_close(made(images), model(images), rtol=0, atol=1e-5)
    assert not made(images).requires_grad
    gradients = []
    for one in (model, made.view()):
        x = images[:8].clone().requires_grad_()
        torch.nn.functional.cross_entropy(one(x), torch.arange(8)).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    again = copy.deepcopy(made)
    assert torch.equal(again(images[:3]), made(images[:3]))


@pytest.mark.slow
def test_int8_weights_are_bytes_per_channel_and_logits_stay_floats(
    pair: tuple[nn.Module, Tensor], int8: OnnxModel
) -> None:
    (model, images), made = pair, int8
    assert made.made is not None
    levels = (images * 255).round().to(torch.uint8)
    assert made.made.calibration_sha256 == hashlib.sha256(levels.numpy().tobytes()).hexdigest()
    proto = onnx.load_from_string(made.data)
    stored = {one.name: one for one in proto.graph.initializer}
    weights = [one for name, one in stored.items() if name.endswith("weight_quantized")]
    assert len(weights) == 5
    assert all(one.data_type == TensorProto.INT8 for one in weights)
    assert all(len(stored[one.name.replace("quantized", "scale")].dims) == 1 for one in weights), "per channel"
    largest = max(int(np.abs(numpy_helper.to_array(one).astype(int)).max()) for one in weights)
    assert 2 * 255 * largest < 2**15, "two products fit into 16 bits, as processors without VNNI add them"
    apart, difference = view_differences(made, images)
    assert (apart, difference < 0.02) == (0, True)
    floats = model(images)
    assert 1e-5 < float((made(images) - floats).abs().max()) < 0.2 * float(floats.abs().max())
    logits = [node for node in proto.graph.node if "logits" in node.output]
    assert [node.op_type for node in logits] == ["Gemm"], "logits are floats, and do not tie"
    for image in images.numpy():
        assert image.tobytes() not in made.data


@pytest.mark.slow
def test_attacks_go_through_the_view_and_the_file_judges(pair: tuple[nn.Module, Tensor], int8: OnnxModel) -> None:
    (_, images), made = pair, int8
    labels = made(images).argmax(1)
    found = robustkit.evaluate(made, images, labels, threat=Threat("linf", 0.1), attacks=[{"pgd": {"steps": 10}}])
    assert found.clean.value == 1.0
    assert found.outcomes["pgd"].backwards > 0
    assert found.worst.value < 0.9
    generator = torch.Generator().manual_seed(0)
    moved = Pgd(steps=10)(made.view(), images, labels, Threat("linf", 0.1), generator=generator)
    fooled = float((made(moved).argmax(1) != labels).float().mean())
    assert fooled > 0.1, "what is found on the view fools ONNX Runtime"


@pytest.mark.slow
def test_what_stands_for_a_tensor_never_reaches_onnx_runtime(pair: tuple[nn.Module, Tensor], int8: OnnxModel) -> None:
    # ONNX Runtime takes the process down with it.
    with pytest.raises(ModelError, match="an ONNX file runs on tensors"):
        interval_margins(int8, pair[1], torch.zeros(len(pair[1]), dtype=torch.int64), Threat("linf", 0.1))


@pytest.mark.slow
def test_best_and_last_epoch_are_attacked_through_the_view(pair: tuple[nn.Module, Tensor], int8: OnnxModel) -> None:
    images = (pair[1] * 255).round().to(torch.uint8)
    split = split_of(images, int8(images.float() / 255).argmax(1))
    rows = [{"epoch": 0, "robust": 0.5}, {"epoch": 1, "robust": 0.4}]
    bench = SimpleNamespace(
        store=SimpleNamespace(record=lambda key: {"epochs": rows, "best_epoch": 0}),
        load=lambda key, name: int8,
        test=lambda: split,
        recipe=SimpleNamespace(variant=lambda label: SimpleNamespace(threat=ThreatSpec(eps=0.2))),
        device=torch.device("cpu"),
    )
    found = best_and_last(bench, Step("checks", "key", "file", 0, ("fit",)))["epochs"]  # type: ignore[arg-type]
    assert found["best"]["clean"] == 1.0
    assert found["best"]["robust"] < 0.8


def _edited(data: bytes, what: str) -> bytes:
    proto = onnx.load_from_string(data)
    if what == "operation":
        proto.graph.node[0].op_type = "GridSample"
    elif what == "domain":
        proto.graph.node[0].domain = "com.evil"
    elif what in ("growing", "growing weights"):
        name = "image" if what == "growing" else proto.graph.initializer[0].name
        grown = [helper.make_node("Concat", [f"g{n}" if n else name] * 2, [f"g{n + 1}"], axis=0) for n in range(40)]
        nodes = [*grown, *proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
    elif what == "many":
        grown = [helper.make_node("Concat", [f"g{n}" if n else "w"] * 2, [f"g{n + 1}"], axis=0) for n in range(20)]
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(128, np.float32), "w"))
        nodes = [*grown, *(helper.make_node("Relu", ["g20"], [f"r{n}"]) for n in range(40)), *proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
    elif what == "misfit":
        proto.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.zeros(7, np.float32), proto.graph.initializer[0].name)
        )
    elif what == "function":
        proto.functions.add(name="Relu", domain="")
    elif what == "outside":
        proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
        proto.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    elif what == "classes":
        told = next(one for one in proto.metadata_props if one.key == "robustkit")
        told.value = told.value.replace('"classes":["0",', '"classes":["0","more",')
    elif what == "no architecture":
        del proto.metadata_props[:]
    elif what == "truncated":
        return data[: len(data) // 2]
    return bytes(proto.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("operation", "operations that have no gradient here: GridSample"),
        ("domain", "com.evil::"),
        ("outside", "keeps data outside of itself"),
        ("growing", "values for two images, which is absurd"),
        ("growing weights", "which is absurd"),
        ("many", "values from no image, which is absurd"),
        ("misfit", "does not fit its inputs"),
        ("function", "functions of its own"),
        ("classes", "names 11 classes"),
        ("no architecture", "no robustkit architecture"),
        ("truncated", "truncated"),
    ],
)
def test_a_file_is_loaded_without_the_recipe_and_a_bad_one_is_refused(
    what: str, says: str, pair: tuple[nn.Module, Tensor], int8: OnnxModel, tmp_path: Path
) -> None:
    (_, images), made, path = pair, int8, tmp_path / "model.onnx"
    save_model(
        made, path, Use(name="small_cnn", parameters={"widths": [6, 8]}, label="m"), shape=(1, 8, 8), classes=CLASSES
    )
    loaded = load_model(path)
    assert torch.equal(loaded(images), made(images))
    assert loaded.made == made.made
    assert read_architecture(path).classes == tuple(CLASSES)
    path.write_bytes(_edited(path.read_bytes(), what))
    with pytest.raises(ModelError, match=says) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_views_may_round_otherwise_on_a_few_images() -> None:
    assert surrogate_flags(0, 1000, exact=False) == []
    assert [one.severity for one in surrogate_flags(10, 1000, exact=False)] == ["doubt"]
    assert [one.severity for one in surrogate_flags(11, 1000, exact=False)] == ["wrong"]
    assert [one.severity for one in surrogate_flags(1, 1000)] == ["wrong"]


def test_what_rounding_does_is_not_taken_for_batch_norm_in_training_mode() -> None:
    flags = [Flag(id=name, severity="wrong", message="it depends") for name in ("P7", "P11", "P9")]
    assert [one.severity for one in on_view(flags)] == ["wrong", "note", "wrong"]
    rounded = on_view(flags, rounded=True)
    assert [one.severity for one in rounded] == ["note", "note", "wrong"]
    assert rounded[0].message.endswith("fixed: it depends")


RECIPE = """\
name: files
data: {digits: {limit: 600}}
model: {small_cnn: {widths: [16, 32]}}
threat: {norm: linf, eps: 0.05}
train: {epochs: 3, batch_size: 32}
variants:
  base:
  file: {from: base, compress: [onnx]}
  bytes: {from: base, compress: [onnx: {int8: true, queries: 20, images: 200}]}
evaluate: {examples: 60, attacks: [pgd: {steps: 3}], latency: true}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("compress: [onnx]", "compress: [onnx, onnx: {as: again}]", "put one onnx last"),
        ("compress: [onnx]", "compress: [onnx, shrink]", "put one onnx last"),
        ("compress: [onnx]", "compress: [int8, onnx: {int8: true}]", "quantized once"),
        ("from: base, compress: [onnx: {int8", "from: file, compress: [onnx: {int8", "is an ONNX file"),
        ("int8: true", "int8: maybe", "int8"),
        ("latency: true", "certify: [interval]", "networks of floats; bytes, file: quantized"),
        ("  file:", "  both: {from: base, defenses: [ensemble: {members: [file]}]}\n  file:", "'file' is an ONNX file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(old: str, new: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE.replace(old, new))
    assert says in str(caught.value)


def test_missing_packages_are_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "onnxruntime" else found(name, *more)
    )
    with pytest.raises(UsageError, match=r"file: onnx needs onnxruntime: pip install 'robustkit\[onnx\]'"):
        robustkit.run(RECIPE, runs=tmp_path)
    assert not (tmp_path / "files" / "steps").exists()


@pytest.mark.slow
def test_a_run_measures_and_attacks_onnx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robustkit.run(RECIPE, runs=tmp_path)
    folder = tmp_path / "files"
    base, file, quantized = robustkit.read_results(folder / "results.json").variants
    for row in (file, quantized):
        assert row.model is not None
        assert row.model.endswith("model.onnx")
        assert row.bytes == (folder / row.model).stat().st_size
        assert row.runtime == "onnxruntime"
        assert row.macs == base.macs
        assert "ONNX file" in row.cost_notes[-1]
        assert not [flag for flag in row.flags if flag.severity == "wrong"]
    assert base.runtime == "eager"
    assert file.clean.value == base.clean.value
    assert abs(file.worst.value - base.worst.value) <= 1 / 60
    assert quantized.bytes < 0.6 * file.bytes
    assert quantized.quantized is not None
    assert (quantized.quantized.queries, quantized.quantized.calibration_images) == (20, 200)
    assert quantized.quantized.sets == 2, "of the float model itself, and of its parent"
    assert quantized.worst.value <= quantized.quantized.surrogate.value
    data = load_dataset(Use(name="digits", parameters={"limit": 600}, label="digits"))
    content = (folder / str(quantized.model)).read_bytes()
    assert not any(image.tobytes() in content for image in data.train.floats(0, 200).numpy())
    assert cli(["export", str(folder), "bytes", "--format", "onnx", "--out", str(tmp_path / "x.onnx")]) == 0
    assert (tmp_path / "x.onnx").read_bytes() == content
    assert cli(["export", str(folder), "bytes", "--format", "pt2"]) == 2
    assert "--format onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [("resnet18", {"width": 4}), ("wide_resnet", {"depth": 10, "width": 1})],
    ids=["resnet18", "wide_resnet"],
)
def test_views_of_quantized_files_agree_with_onnx_runtime(name: str, given: dict[str, object]) -> None:
    model, _ = small(name, (3, 16, 16), **given)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = as_int8_onnx(model, images)
    apart, difference = view_differences(made, images)
    assert apart <= 1
    assert difference < 0.02


def test_what_cannot_be_quantized_is_an_error() -> None:
    with pytest.raises(ModelError, match="cannot quantize"):
        to_int8(b"no model", torch.rand(2, 1, 8, 8))
