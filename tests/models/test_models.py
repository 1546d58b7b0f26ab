"""Models: the plain CNN as it is described, every model on images it fits, clear words on those it does not."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.errors import ModelError
from robustkit.models.artefact import load_model, save_model
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.build import build_inner, build_model
from robustkit.models.normalized import Normalized
from robustkit.recipe.spec import Use


def use(name: str, **parameters: object) -> Use:
    return Use(name=name, parameters=parameters, label=name)


def build(
    name: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, folder: Path | None = None, **given: object
) -> Normalized:
    torch.manual_seed(0)
    statistics: Sequence[float] = [0.5] * shape[0]
    return build_model(use(name, **given), shape=shape, classes=classes, mean=statistics, std=statistics, folder=folder)


def shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: tuple(out.shape[1:])}))  # type: ignore[misc]
    model(x)
    return found


def test_the_plain_cnn_has_the_layers_it_is_described_with() -> None:
    model = BaselineCnn((1, 28, 28), 10)
    assert model.conv1.weight.shape == (64, 1, 5, 5)
    assert model.conv2.weight.shape == (128, 64, 5, 5)
    assert model.fc1.weight.shape == (1024, 128 * 4 * 4)
    assert model.fc2.weight.shape == (10, 1024)
    found = shapes(model, torch.rand(2, 1, 28, 28))
    assert found["conv1"] == (64, 24, 24)
    assert found["conv2"] == (128, 8, 8)
    assert found["pool"] == (128, 4, 4)
    assert [type(layer) for layer in (model.norm1, model.norm2)] == [nn.Identity, nn.Identity]
    assert sum(weight.numel() for weight in model.parameters()) == (
        64 * 25 + 64 + 128 * 64 * 25 + 128 + 2048 * 1024 + 1024 + 1024 * 10 + 10
    )


def test_its_forward_is_conv_pool_relu_twice_and_two_linear_layers() -> None:
    torch.manual_seed(0)
    model = BaselineCnn((3, 32, 32), 7).eval()
    x = torch.rand(4, 3, 32, 32)
    y = torch.relu(nn.functional.max_pool2d(nn.functional.conv2d(x, model.conv1.weight, model.conv1.bias), 2))
    y = torch.relu(nn.functional.max_pool2d(nn.functional.conv2d(y, model.conv2.weight, model.conv2.bias), 2))
    y = torch.relu(y.flatten(1) @ model.fc1.weight.T + model.fc1.bias)
    torch.testing.assert_close(model(x), y @ model.fc2.weight.T + model.fc2.bias)


@pytest.mark.parametrize("side", [16, 17, 28, 32, 40])
def test_its_first_linear_layer_is_as_wide_as_the_image_asks_for(side: int) -> None:
    left = ((side - 4) // 2 - 4) // 2
    assert BaselineCnn((1, side, side), 10).fc1.in_features == 128 * left * left
    assert BaselineCnn((1, side, side + 8), 10)(torch.rand(2, 1, side, side + 8)).shape == (2, 10)


@pytest.mark.parametrize(("side", "layer"), [(15, "conv2"), (8, "conv2"), (5, "conv1")])
def test_images_that_are_too_small_are_named_with_the_layer(side: int, layer: str) -> None:
    with pytest.raises(ModelError, match=rf"layer {layer}.*{side} are too small, 16 is the least"):
        build("baseline_cnn", (1, side, side))


def test_its_options() -> None:
    plain, rich = BaselineCnn((1, 28, 28), 10), BaselineCnn((1, 28, 28), 10, True, True, 0.5)
    assert isinstance(rich.norm1, nn.BatchNorm2d)
    assert isinstance(rich.norm2, nn.BatchNorm2d)
    assert rich.shortcut is not None
    assert plain.shortcut is None
    assert (rich.drop1.p, rich.drop2.p) == (0.5, 0.5)
    x = torch.rand(4, 1, 28, 28)
    torch.manual_seed(0)
    first = rich(x)
    assert not torch.equal(first, rich(x)), "dropout is at work in training mode"
    rich.eval()
    assert torch.equal(rich(x), rich(x))
    with torch.no_grad():
        before = rich(x)
        rich.shortcut.weight.zero_()
        assert rich.shortcut.bias is not None
        rich.shortcut.bias.zero_()
    assert not torch.equal(before, rich(x)), "the residual path carries something"


MODELS: list[tuple[str, tuple[int, int, int], dict[str, object]]] = [
    ("baseline_cnn", (1, 28, 28), {}),
    ("baseline_cnn", (3, 32, 32), {"batch_norm": True, "residual": True, "dropout": 0.2}),
    ("small_cnn", (3, 32, 32), {}),
    ("small_cnn", (1, 8, 8), {"widths": [8, 16]}),
    ("resnet18", (3, 32, 32), {"width": 8}),
    ("resnet18", (1, 28, 28), {"width": 8}),
    ("wide_resnet", (3, 32, 32), {"depth": 10, "width": 1}),
    ("wide_resnet", (1, 28, 28), {"depth": 16, "width": 1, "dropout": 0.3}),
    ("torchvision.mobilenet_v3_small", (3, 64, 64), {}),
    ("torchvision.resnet18", (1, 32, 32), {}),
]


@pytest.mark.parametrize(
    ("name", "shape", "given"), MODELS, ids=[f"{one[0]}-{one[1][0]}x{one[1][1]}" for one in MODELS]
)
def test_every_model(name: str, shape: tuple[int, int, int], given: dict[str, object], tmp_path: Path) -> None:
    """Logits, gradients to every weight and to the image, a file that gives the same bits, the meta device."""
    model = build(name, shape, 7, **given)
    x = torch.rand(4, *shape, requires_grad=True)
    logits = model.train()(x)
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert x.grad is not None
    assert bool(x.grad.flatten(1).any(1).all())
    assert all(weight.grad is not None for weight in model.parameters())
    model.eval()
    path = tmp_path / "model.safetensors"
    classes = tuple("abcdefg")
    save_model(model, path, use(name, **given), shape=shape, classes=classes)
    loaded = load_model(path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        channels_last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(channels_last(x), loaded(x), rtol=1e-4, atol=1e-5)
    assert model.to("meta")(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 75)])
def test_models_with_auxiliary_outputs_train_without_them(name: str, side: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(f"torchvision.{name}", (3, side, side), 7).train()
    logits = model(torch.rand(2, 3, side, side))
    assert isinstance(logits, Tensor)
    nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    path = tmp_path / "model.safetensors"
    save_model(model, path, use(f"torchvision.{name}"), shape=(3, side, side), classes=tuple("abcdefg"))
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(load_model(path)(x), model.eval()(x))


def test_every_parameter_that_a_builder_of_torchvision_is_said_to_take_is_taken() -> None:
    """Each at its default: whatever is no parameter after all, or is given twice, cannot be made."""
    for name in registry.torchvision_files():
        # RegNets work out their widths on the device, which the meta device cannot; all have one signature.
        regnet = name.startswith("regnet")
        if regnet and not name.endswith("_400mf"):
            continue
        known = registry.parameters(registry.find("model", f"torchvision.{name}"))
        given = {one.name: one.default for one in known if one.name != "init_weights" or one.default is not None}
        with torch.device("cpu" if regnet else "meta"):
            build_inner(use(f"torchvision.{name}", **given), shape=(3, 64, 64), classes=7)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("resnet18", {"widht_per_group": 3}, "did you mean 'width_per_group'"),
        ("resnet18", {"layers": [1, 1, 1, 1]}, "unknown parameter 'layers'"),
        ("resnext50_32x4d", {"groups": 2}, "unknown parameter 'groups'"),
        ("densenet121", {"growth_rate": 8}, "unknown parameter 'growth_rate'"),
        ("googlenet", {"aux_logits": True}, "unknown parameter 'aux_logits'"),
        ("resnet18", {"num_classes": 5}, "unknown parameter 'num_classes'"),
        ("vit_b_16", {"image_size": "large"}, "image_size: "),
        ("resnet18", {"weights": "DEFAULT"}, "random weights"),
    ],
)
def test_parameters_of_torchvision_are_checked(name: str, given: dict[str, object], message: str) -> None:
    _, mistakes = registry.check_parameters(registry.find("model", f"torchvision.{name}"), given)
    assert [one for one, _ in mistakes] == list(given)
    assert message in mistakes[0][1]


def test_every_built_in_model_is_in_the_table() -> None:
    assert set(registry.BUILTIN["model"]) == {name for name, _, _ in MODELS if "." not in name}


def test_resnet18_and_wide_resnet_have_the_papers_sizes() -> None:
    assert sum(one.numel() for one in build("resnet18").parameters()) == 11_173_962
    assert sum(one.numel() for one in build("wide_resnet", depth=28, width=10).parameters()) == 36_479_194
    with pytest.raises(ModelError, match="6n"):
        build("wide_resnet", depth=15)


def test_normalization_is_inside_and_can_be_given() -> None:
    model = build_model(
        use("small_cnn"), shape=(3, 32, 32), classes=10, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]
    ).eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(x), model.inner((x - mean) / std))
    with pytest.raises(ModelError, match="1 means"):
        build_model(use("small_cnn"), shape=(3, 32, 32), classes=10, mean=[0.5], std=[0.5])


OWN = """
import torch
from torch import nn


class Mine(nn.Module):
    "My own."

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, classes)
        self.width = width

    def forward(self, x):
        return self.head(x.flatten(1))


class Odd(Mine):
    "Returns too few logits."

    def forward(self, x):
        return super().forward(x)[:, :2]


def text(classes: int) -> str:
    "No module."
    return "text"
"""


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    model = build("own.py:Mine", (3, 8, 8), folder=tmp_path, width=9)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    path = tmp_path / "own.safetensors"
    save_model(model, path, use("own.py:Mine", width=9), shape=(3, 8, 8), classes=tuple("0123456789"))
    with pytest.raises(ModelError, match="trust_plugins=True"):
        load_model(path, folder=tmp_path)
    loaded = load_model(path, folder=tmp_path, trust_plugins=True)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))


def test_a_model_that_does_not_fit_names_the_layer_and_the_sizes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ModelError, match=r"layer head.*\(768,\)"):
        build("own.py:Mine", (3, 16, 16), folder=tmp_path)
    with pytest.raises(ModelError, match=r"returns \(2, 2\)"):
        build("own.py:Odd", (3, 8, 8), folder=tmp_path)
    with pytest.raises(ModelError, match="makes a str"):
        build("own.py:text", (3, 8, 8), folder=tmp_path)
    with pytest.raises(ModelError, match="too small"):
        build("small_cnn", (1, 3, 3))


def test_a_misfit_of_torchvision_is_told_like_any_other() -> None:
    with pytest.raises(ModelError, match=r"vit_b_16 does not fit images of \(3, 32, 32\).*Wrong image height"):
        build("torchvision.vit_b_16")
    with pytest.raises(ModelError, match=r"vit_b_16 cannot be made with {'image_size': 33}"):
        build("torchvision.vit_b_16", image_size=33)


def test_small_cnn_without_widths_says_so() -> None:
    with pytest.raises(ModelError, match="`widths` is empty"):
        build("small_cnn", (1, 8, 8), widths=[])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(build("small_cnn", (1, 8, 8), widths=[4, 4]), path, use("small_cnn", widths=[4, 4]), shape=(1, 8, 8),
               classes=tuple("0123456789"))  # fmt: skip
    return path


def header(raw: bytes, old: str, new: str) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + size].decode()
    assert old in text
    changed = text.replace(old, new).encode()
    return len(changed).to_bytes(8, "little") + changed + raw[8 + size :]


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    return buffer.getvalue()


def escaped(text: str) -> str:
    return text.replace('"', '\\"')


MODEL = escaped('"small_cnn","parameters":{"widths":[4,4]}')
DEEP = escaped('"wide_resnet","parameters":{"depth":600000004,"width":1}')
WIDE = escaped('"resnet18","parameters":{"width":1000000000000}')
WIDER = escaped('"widths":{"inner.groups.0.conv1":{"inputs":1,"outputs":5}}')
NOWHERE = escaped('"widths":{"inner.nowhere":{"inputs":1,"outputs":1}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: b"", "not a safetensors"),
        (lambda raw: b"\xff" * 8 + raw, "not a safetensors"),
        (lambda raw: header(raw, "robustkit/1", "robustkit/9"), "robustkit/9"),
        (lambda raw: header(raw, '\\"small_cnn\\"', '\\"no_such_cnn\\"'), "no_such_cnn"),
        (lambda raw: header(raw, "[4,4]", "[4,5]"), "shape"),
        (lambda raw: header(raw, "[4,4]", "[4,4,4]"), "missing"),
        (lambda raw: header(raw, "[4,4]", "[4,9999999999]"), "model.safetensors"),
        (lambda raw: header(raw, "[1,8,8]", "[1,8,-8]"), "absurd"),
        (lambda raw: header(raw, '\\"widths\\"', '\\"width\\"'), "width"),
        (lambda raw: pickle.dumps({"weight": 1}), "a pickle or a file of torch.save"),
        (lambda raw: saved_by_torch(), "a pickle or a file of torch.save"),
        (lambda raw: header(raw, '\\"widths\\":{}', WIDER), "more than the architecture's 1 -> 4"),
        (lambda raw: header(raw, '\\"widths\\":{}', NOWHERE), "inner.nowhere is no convolution"),
        (lambda raw: header(raw, '\\"members\\":0', '\\"members\\":10000'), "far more layers than the"),
        (lambda raw: header(raw, MODEL, DEEP), "far more layers than the"),
        (lambda raw: header(raw, MODEL, WIDE), "cannot be built"),
        (lambda raw: header(raw, '"robustkit":', '"otherkit":'), "load_weights"),
    ],
    ids=[
        "cut",
        "empty",
        "garbage",
        "format",
        "unknown",
        "shape",
        "layers",
        "huge",
        "negative",
        "parameter",
        "pickle",
        "zip",
        "widened",
        "nowhere",
        "members",
        "deep",
        "wide",
        "foreign",
    ],
)
def test_a_broken_or_hostile_file_is_an_error_that_names_it(spoil: object, message: str, stored: Path) -> None:
    stored.write_bytes(spoil(stored.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelError, match=message) as caught:
        load_model(stored)
    assert "model.safetensors" in str(caught.value)


def test_a_file_cannot_smuggle_code_in(stored: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    'Evil.'\n")
    stored.write_bytes(header(stored.read_bytes(), '\\"small_cnn\\"', '\\"evil.py:Evil\\"'))
    with pytest.raises(ModelError):
        load_model(stored, folder=tmp_path)
    assert not mark.exists()
