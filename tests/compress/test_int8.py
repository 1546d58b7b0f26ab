"""Quantized models: stored bit for bit without pickle, a surrogate with gradients, mistakes in recipes."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robustkit
from robustkit.attacks.adaptive import Through
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.cli.group import run as cli
from robustkit.compress.int8 import Int8, check_surrogate, quantize
from robustkit.compress.pt2e import quantized_graph
from robustkit.compress.qat import FakeQuantization
from robustkit.compress.sensitivity import layer_sensitivity
from robustkit.data.split import split_of
from robustkit.errors import ModelError, RecipeError, UsageError
from robustkit.evaluation.artefact_rules import missed_flags, stronger_flags, surrogate_flags
from robustkit.evaluation.both import attack_both, checked_view
from robustkit.models.artefact import load_model, save_model
from robustkit.models.build import build_model
from robustkit.models.fake_quantized import FakeConv2d, FakeLinear, ranges_of, rounded_input, rounded_weight
from robustkit.models.normalized import Normalized
from robustkit.models.program import as_program
from robustkit.models.quantized import Quantization, Quantized, round_trip
from robustkit.models.wrapped import view_of
from robustkit.recipe.plan import Step, make_plan
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import ThreatSpec, Use
from robustkit.steps.fit import FLOAT
from robustkit.steps.last import best_and_last

Shape = tuple[int, int, int]
CLASSES = tuple("0123456789")
SHAPE: Shape = (1, 8, 8)
USE = Use(name="small_cnn", parameters={"widths": [8, 16]}, label="small_cnn")


def images(shape: Shape = SHAPE, count: int = 32, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def made(use: Use = USE, shape: Shape = SHAPE) -> Normalized:
    """A model whose batch norms have seen something."""
    torch.manual_seed(0)
    model = build_model(use, shape=shape, classes=10, mean=[0.4] * shape[0], std=[0.3] * shape[0])
    with torch.no_grad():
        for _ in range(2):
            model(images(shape))
    return model.eval()


@pytest.fixture(scope="module")
def small() -> Quantized:
    return quantize(made(), images())


def saved(model: nn.Module, path: Path, use: Use = USE, shape: Shape = SHAPE) -> Path:
    save_model(model, path, use, shape=shape, classes=CLASSES)
    return path


def test_the_artefact_is_the_converted_graph_and_its_surrogate_the_same_with_gradients(small: Quantized) -> None:
    x = images(count=48, seed=1)
    graph = quantized_graph(made(), SHAPE, images().split(64))
    with torch.no_grad():
        expected = graph(x)
        assert torch.equal(small(x), expected)
        assert torch.equal(small.surrogate(x), expected)
        assert torch.equal(small(x[:1]), graph(x[:1]))
    start = x.clone().requires_grad_()
    assert not small(start).requires_grad
    (gradient,) = torch.autograd.grad(small.surrogate(start).sum(), start)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert {one.dtype for one in small.weights().values()} == {torch.int8}
    largest = max(int(one.int().abs().max()) for one in small.weights().values())
    assert largest > 60
    assert 2 * 255 * largest < 2**15, "two products fit into 16 bits, as processors without VNNI add them"
    assert sum(one.numel() for one in small.weights().values()) == sum(
        one.numel() for one in made().parameters() if one.dim() > 1
    )


def test_lone_batch_norms_and_dropout_change_nothing() -> None:
    class Odd(nn.Module):
        """A batch norm with no convolution before it, one after a pool, and dropouts."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(1), nn.BatchNorm2d(4)
            self.conv, self.head, self.drop = nn.Conv2d(1, 4, 3), nn.Linear(36, 10), nn.Dropout(0.5)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.relu(self.conv(self.relu(self.first(x)))), 2)
            return self.head(self.drop(self.second(x).flatten(1)))

    torch.manual_seed(0)
    model = Odd()
    for _ in range(3):
        model(images(seed=4))
    found, x = quantize(model.eval(), images()), images(seed=3)
    with torch.no_grad():
        apart, expected = (found(x) - model(x)).abs().max(), model(x)
    assert apart < 0.03 * expected.abs().max()


def test_a_file_has_bytes_for_weights_and_rebuilds_the_same_bit_for_bit(tmp_path: Path) -> None:
    use = Use(name="baseline_cnn", parameters={}, label="baseline_cnn")
    shape: Shape = (1, 16, 16)
    model = made(use, shape)
    small = quantize(model, images(shape))
    whole = saved(model, tmp_path / "float.safetensors", use, shape)
    path = saved(small, tmp_path / "int8.safetensors", use, shape)
    share = path.stat().st_size / whole.stat().st_size
    assert 0.25 < share < 0.27
    tensors = load_file(path)
    assert all(one.dim() < 2 or one.numel() < 100 for one in tensors.values() if one.dtype == torch.float32)
    again, x = robustkit.load(path), images(shape, seed=5)
    assert isinstance(again, Quantized)
    assert again.made == small.made
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
        assert torch.equal(again.surrogate(x), small(x))


def test_calibration_images_are_recorded_by_hash_and_in_no_file(small: Quantized, tmp_path: Path) -> None:
    levels = (images() * 255).round().to(torch.uint8).numpy()
    assert small.made == Quantization(
        bits=8, calibration_images=32, calibration_sha256=hashlib.sha256(levels.tobytes()).hexdigest()
    )
    raw = saved(small, tmp_path / "small.safetensors").read_bytes()
    assert levels[0].tobytes() not in raw
    assert images()[0].numpy().tobytes() not in raw


def test_fewer_bits_have_fewer_levels() -> None:
    found = quantize(made(), images(), bits=2)
    for weight in found.weights().values():
        assert set(weight.unique().tolist()) == {-2, -1, 0, 1}
    tops = {one.args[4] for one in found.program.calls if one.op == "quantize_per_tensor.default"}
    assert tops == {3}


def test_the_identity_goes_back_where_values_are_clipped() -> None:
    x = torch.tensor([-3.0, 0.2, 9.0], requires_grad=True)
    value = round_trip(x, 0.5, 2, 0, 7)
    assert value.tolist() == [-1.0, 0.0, 2.5]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    # torch's own has none there.
    (clipped,) = torch.autograd.grad(torch.fake_quantize_per_tensor_affine(x, 0.5, 2, 0, 7).sum(), x)
    assert clipped.tolist() == [0.0, 1.0, 0.0]


def _edited(path: Path, change: Any, tensors: Any = None) -> Path:
    """Write a model file again with another description."""
    with safe_open(str(path), framework="pt") as file:
        described = json.loads(file.metadata()["robustkit"])
    change(described)
    held = load_file(path)
    if tensors is not None:
        tensors(held)
    save_file(held, path, metadata={"robustkit": json.dumps(described)})
    return path


def _pad(described: dict[str, Any]) -> None:
    calls = described["quantized"]["program"]["calls"]
    calls.insert(0, {"op": "pad.default", "args": [{"of": "input"}, [0, 10**9, 0, 10**9]]})
    for call in calls[1:]:
        call["args"] = [
            {**one, "is": one["is"] + 1} if isinstance(one, dict) and one.get("of") == "call" else one
            for one in call["args"]
        ]
    calls[1]["args"][0] = {"of": "call", "is": 0}


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda d: d["quantized"]["program"]["calls"][0].update(op="os.system"), None, "no operation of a quantized"),
        (lambda d: d["quantized"]["program"]["calls"].pop(), None, "its graph gives"),
        (lambda d: d["quantized"]["program"].update(calls=[]), None, "architecture cannot be read"),
        (_pad, None, "which is absurd"),
        (
            lambda d: d["quantized"]["program"]["calls"][-1]["args"].__setitem__(0, {"of": "call", "is": 10**6}),
            None,
            "not there",
        ),
        (lambda d: d["quantized"]["made"].update(bits=99), None, "architecture cannot be read"),
        (lambda d: d.update(classes=["a", "b", "c"]), None, "its graph gives"),
        (lambda d: None, lambda held: held.pop(sorted(held)[0]), "not there"),
        (lambda d: None, lambda held: held.update(forward=torch.zeros(1)), "cannot be the name"),
        (lambda d: None, lambda held: held.update(x=torch.zeros(1, dtype=torch.complex64)), "no quantized model has"),
    ],
)
def test_hostile_files_are_refused(change: Any, tensors: Any, message: str, small: Quantized, tmp_path: Path) -> None:
    path = _edited(saved(small, tmp_path / "bad.safetensors"), change, tensors)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(small: Quantized, tmp_path: Path) -> None:
    path = saved(small, tmp_path / "small.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated"):
        load_model(path)


def test_an_operation_that_no_file_can_hold_is_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(1).values[:, :10]

    graph = torch.export.export(Sorted(), (torch.zeros(2, *SHAPE),), strict=True).module()
    with pytest.raises(ModelError, match=r"cannot hold aten\.sort"):
        as_program(graph)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_is_told() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] if float(x.sum()) > 0 else -x.flatten(1)[:, :10]

    with pytest.raises(ModelError, match="int8: the model cannot be quantized"):
        quantize(Branching(), images())


def test_without_torchao_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(UsageError, match=r"pip install 'robustkit\[int8\]'"):
        quantize(made(), images())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HEAD + "  a:\n  b: {from: a, compress: [int8]}\n")
    assert cli(["run", str(recipe), "--runs", str(tmp_path / "runs")]) == 2
    assert "b: int8 needs torchao: pip install" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_whose_parts_have_numbers_for_names_is_quantized() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    made = quantize(plain, images())
    assert torch.allclose(made(images()), plain(images()), atol=0.1)


def test_a_quantized_model_cannot_be_scanned(small: Quantized) -> None:
    with pytest.raises(UsageError, match="scan the one it was made of"):
        layer_sensitivity(small, images(count=4), torch.arange(4), Threat("linf", 0.1))


def test_a_surrogate_that_answers_otherwise_is_a_flag_of_any_evaluation(small: Quantized) -> None:
    """As on a processor whose kernels add otherwise than those of where the file was made."""
    x, other = images(), copy.deepcopy(small)
    y = small(x).argmax(1)
    threat = Threat("linf", 0.01)
    whole = robustkit.evaluate(small, x, y, threat=threat, attacks=["fgsm"])
    assert "int8-surrogate" not in [flag.id for flag in whole.flags]
    other.surrogate = nn.Sequential(other.surrogate, nn.Linear(10, 10))  # type: ignore[assignment]
    with torch.no_grad():
        other.surrogate[1].weight.copy_(-torch.eye(10))  # type: ignore[index]
    apart = robustkit.evaluate(other, x, y, threat=threat, attacks=["fgsm"])
    assert [flag.severity for flag in apart.flags if flag.id == "int8-surrogate"] == ["wrong"]


def test_a_surrogate_that_answers_otherwise_stops_the_step(small: Quantized) -> None:
    other = copy.deepcopy(small)
    next(one for name, one in other.surrogate.named_buffers() if name.endswith("_floats")).mul_(1.01)
    with pytest.raises(ModelError, match=r"answers otherwise than the quantized model on \d+ training images"):
        check_surrogate(other, [images()])


def test_attacks_climb_the_surrogate_and_the_artefact_judges(small: Quantized) -> None:
    assert view_of(small) is small.surrogate
    assert checked_view(small, (images() * 255).round().to(torch.uint8)) is small.surrogate
    called: list[Any] = []

    def run(attack: Any, again: bool) -> Any:
        called.append(attack)

    attack_both(small, Pgd(steps=1), run)
    assert len(called) == 1
    assert isinstance(called[0], Through)
    model, x, y = made().train(), images(seed=7), torch.arange(32) % 10
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = robustkit.evaluate(quantize(model, x), x, y, threat=Threat("linf", 0.2), attacks=["pgd"])
    assert found.clean.value > 0.8
    assert found.worst.value < 0.5
    assert not any(flag.id == "P9" for flag in found.flags)


def test_flags_of_quantized_models() -> None:
    right = np.ones(200, dtype=bool)
    three, many = right.copy(), right.copy()
    three[:3] = False
    many[:40] = False
    assert stronger_flags(three, three, trained=False) == []
    assert [one.severity for one in stronger_flags(right, many, trained=False)] == ["wrong"]
    assert [one.severity for one in stronger_flags(right, many, trained=True)] == ["note"]
    assert stronger_flags(right, three, trained=False) == []
    five = right.copy()
    five[:5] = False
    assert [one.severity for one in stronger_flags(right, five, trained=False)] == ["doubt"]
    assert missed_flags(right, right, right) == []
    assert [one.id for one in missed_flags(right, three, right)] == ["int8-missed"]
    assert "Square" in missed_flags(right, right, three)[0].message
    # One of few is chance.
    assert missed_flags(right[:50], np.arange(50) > 0, right[:50]) == []
    # What the surrogate's attacks found as well is not missed.
    assert missed_flags(three, three, three) == []
    assert surrogate_flags(0, 200) == []
    assert [one.severity for one in surrogate_flags(1, 200)] == ["wrong"]


def test_fake_quantization_keeps_names_and_goes_out_again() -> None:
    model, x = made(), images(seed=2)
    names, before = list(model.state_dict()), model(x).detach()
    hook = FakeQuantization(4, lambda: images())
    assert hook.prepare_model(model) is model
    assert [name for name in model.state_dict() if "input_" not in name] == names
    assert not torch.equal(model(x), before)
    low = model.inner.groups[0].conv1.input_low
    outside = low - 1
    assert isinstance(low, Tensor)
    model.eval()(x * 2)
    assert torch.equal(model.inner.groups[0].conv1.input_low, low)
    copied = hook.restore_model(copy.deepcopy(model))
    hook.restore_model(model)
    for one in (model, copied):
        assert list(one.state_dict()) == names
        assert {type(module) for module in one.modules() if hasattr(module, "weight")} <= {
            nn.Conv2d, nn.Linear, nn.BatchNorm2d
        }  # fmt: skip
        assert torch.equal(one(x), before)
    ranges = ranges_of(model)
    assert ranges is not None
    assert set(ranges) == {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert float(outside) < ranges["inner.groups.0.conv1"][0]


def test_what_was_trained_with_is_what_is_shipped() -> None:
    model = made()
    hook = FakeQuantization(2, lambda: images())
    hook.prepare_model(model)
    for module in model.modules():
        if isinstance(module, FakeConv2d | FakeLinear):
            module.input_high.mul_(0.4)
    with torch.no_grad():
        trained = model.eval()(images(seed=2))
    hook.restore_model(model)
    shipped = quantize(model, images(), bits=2)
    assert shipped.made.trained
    with torch.no_grad():
        apart = (shipped(images(seed=2)) - trained).abs().mean()
        plain = (quantize(made(), images(), bits=2)(images(seed=2)) - trained).abs().mean()
    # Torchao rounds some pools and sums too, which the training leaves alone.
    assert apart < 0.5 * plain
    ranges = ranges_of(model)
    assert ranges is not None
    low, high = ranges["inner.groups.0.conv1"]
    first = next(one for one in shipped.program.calls if one.op == "quantize_per_tensor.default")
    assert first.args[1] == pytest.approx((max(high, 0) - min(low, 0)) / 3, rel=1e-5)


def test_fake_rounding_has_the_identitys_gradient() -> None:
    weight = torch.tensor([[0.1, -1.0], [0.0, 4.0]], requires_grad=True)
    value = rounded_weight(weight, 2)
    # Steps of 1/1.5 and 4/1.5, from -2 to 1.
    assert torch.allclose(value, torch.tensor([[0.0, -4 / 3], [0.0, 4 / 1.5]]))
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    assert torch.equal(gradient, torch.ones(2, 2))
    x = torch.tensor([-5.0, 0.4, 7.0], requires_grad=True)
    y = rounded_input(x, torch.tensor(0.0), torch.tensor(3.0), 2)
    assert y.tolist() == [0.0, 0.0, 3.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


def test_layers_that_cannot_be_trained_so_are_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10)))
    with pytest.raises(ModelError, match=r"int8: 1 is a ParametrizedLinear.*drop qat"):
        FakeQuantization(8, lambda: images()).prepare_model(model)
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        FakeQuantization(8, lambda: images()).prepare_model(nn.Flatten())


HEAD = (
    "data: {digits: {limit: 200}}\nmodel: {small_cnn: {widths: [4, 8]}}\nthreat: {norm: linf, eps: 0.1}\n"
    "train: {epochs: 1}\nvariants:\n"
)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("  a: {compress: [int8]}\n  b: {from: a, train: {}}\n", "'a' is quantized"),
        ("  a: {compress: [int8]}\n  b: {from: a, compress: [global_l1: {sparsity: 50%}]}\n", "'a' is quantized"),
        ("  a: {compress: [int8]}\n  b: {from: a, compress: [int8]}\n", "'a' is quantized"),
        ("  a: {compress: [int8, int8: {bits: 4, as: again}]}\n", "quantized once"),
        ("  a:\n  b: {from: a, compress: [int8: {qat: true}]}\n", "this variant is not trained"),
        (
            "  a: {defenses: [spectral_norm]}\n  b: {from: a, compress: [int8: {qat: true}], train: {}}\n",
            "spectral_norm computes them from others",
        ),
        ("  a: {defenses: [partition_ensemble], compress: [int8]}\n", "cannot be compressed"),
        ("  a: {compress: [int8: {bits: 3}]}\n", "bits"),
    ],
)
def test_mistakes_are_shown_by_check(variants: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(HEAD + variants)


def test_a_quantized_variant_is_attacked_after_its_float_ancestors() -> None:
    text = HEAD + (
        "  a:\n  b: {from: a, compress: [global_l1: {sparsity: 50%}]}\n  q: {from: b, compress: [int8: {queries: 7}]}\n"
        "evaluate: {attacks: [pgd, fgsm]}\n"
    )
    plan = make_plan(parse_recipe(text), "data", lambda kind, use: "v1")
    steps = {step.kind: step for step in plan.of("q", 0)}
    artefact = steps["artefact"]
    assert artefact.use is not None
    assert artefact.use.parameters["queries"] == 7
    crafted = {plan.attack_step(label, 0, name).key for label in ("a", "b") for name in ("pgd", "fgsm")}
    assert set(artefact.wants) == crafted
    assert {plan.attack_step("q", 0, name).key for name in ("pgd", "fgsm")} < set(artefact.parents)
    assert not any(step.kind == "artefact" for step in plan.of("b", 0))
    # Another number of queries attacks anew and makes nothing anew but the model, whose parameters they are among.
    assert Int8().queries == 1000


RUN = HEAD.replace("train: {epochs: 1}", "train: {epochs: 1, batch_size: 32}") + (
    "  plain:\n  small: {from: plain, compress: [int8: {images: 64, queries: 20}]}\n"
    "evaluate: {examples: 30, attacks: [fgsm], eps_curve: [0, 0.1], latency: false}\n"
)


@pytest.mark.slow
def test_int8_from_a_recipe_is_stored_resumed_and_reported(tmp_path: Path, capsys: Any) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "runs" / "q"
    recipe.write_text(RUN)
    arguments = ["run", str(recipe), "--runs", str(tmp_path / "runs"), "--name", "q"]
    assert cli(arguments) == 0
    text = (folder / "results.json").read_text()
    plain, small = json.loads(text)["variants"]
    found = small["quantized"]
    assert plain["quantized"] is None
    assert (found["bits"], found["calibration_images"], found["queries"], found["sets"]) == (8, 64, 20, 2)
    assert found["disagreeing"] == 0
    assert found["calibration_sha256"] in (folder / small["model"]).read_bytes().decode("latin1")
    arrays = np.load(folder / small["arrays"])
    assert found["union"]["value"] == pytest.approx(arrays["correct/worst"].mean(), abs=1e-6)
    assert found["union"]["value"] <= min(found["surrogate"]["value"], found["transfer"]["value"])
    assert small["bytes"] == (folder / small["model"]).stat().st_size
    assert small["parameters"] > 0
    assert small["macs"] == plain["macs"]
    assert any(found["calibration_sha256"][:16] in note for note in small["notes"])
    # Nothing is done again, and a lost attack on the artefact is told.
    capsys.readouterr()
    assert cli(arguments) == 0
    assert json.loads((folder / "results.json").read_text())["variants"] == json.loads(text)["variants"]
    artefact = next(step for step in folder.glob("steps/*/record.json") if "disagreeing" in step.read_text())
    before = artefact.read_bytes()
    artefact.unlink()
    assert cli(arguments) == 0
    assert {**json.loads(artefact.read_bytes()), "seconds": 0} == {**json.loads(before), "seconds": 0}


def test_the_best_epoch_of_a_quantized_variant_is_told_by_its_float_model() -> None:
    asked: list[str] = []

    def loaded(key: str, name: str) -> nn.Module:
        asked.append(name)
        return made()

    made_of = {"epochs": [{"epoch": 1, "robust": 0.5}], "best_epoch": 0, "quantization": {"bits": 8}}
    split = split_of((images() * 255).round().to(torch.uint8), torch.arange(32) % 10)
    threat = ThreatSpec(norm="linf", eps=0.1)
    bench: Any = SimpleNamespace(
        store=SimpleNamespace(record=lambda key: made_of),
        recipe=SimpleNamespace(variant=lambda label: SimpleNamespace(threat=threat)),
        test=lambda: split,
        load=loaded,
        device=torch.device("cpu"),
    )
    found = best_and_last(bench, Step("checks", "key", "q", 0, ("fit",)))
    assert asked == [FLOAT, "last.safetensors"]
    assert "of the float model" in found["flags"][0].message
