"""State dicts of other programs: pruned, wrapped or plain, read without running code, or refused with a reason."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import mobilenet_v2

import robustkit
from robustkit.errors import ModelError, UsageError
from robustkit.models.build import build_model
from robustkit.models.normalized import Normalized
from robustkit.models.weights import plain_weights
from robustkit.recipe.spec import Use

SHAPE = (1, 8, 8)
NET: dict[str, dict[str, Any] | None] = {"small_cnn": {"widths": [4, 6]}}
MEAN, STD = (0.3,), (0.4,)


def made(seed: int = 0) -> Normalized:
    torch.manual_seed(seed)
    use = Use(name="small_cnn", parameters={"widths": [4, 6]}, label="small_cnn")
    model = build_model(use, shape=SHAPE, classes=10, mean=MEAN, std=STD)
    with torch.no_grad():
        # Statistics that are not what a new model has.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def loaded(path: Path, **changed: Any) -> nn.Module:
    given: dict[str, Any] = {"model": NET, "shape": SHAPE, "classes": 10, "mean": MEAN, "std": STD, **changed}
    return robustkit.load_weights(path, **given)


def pruned(model: Normalized) -> Normalized:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
        if isinstance(module, nn.Linear):
            prune.random_unstructured(module, "bias", 2)
    return model


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


FILES: dict[str, Callable[[nn.Module, Path], None]] = {
    "plain": lambda net, path: torch.save(net.state_dict(), path),
    "old": lambda net, path: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False),
    "checkpoint": lambda net, path: torch.save({"epoch": 7, "state_dict": net.state_dict()}, path),
    "parallel": lambda net, path: torch.save({"model": prefixed(net.state_dict(), "module.")}, path),
    "compiled": lambda net, path: torch.save(prefixed(net.state_dict(), "_orig_mod."), path),
    "compiled parallel": lambda net, path: torch.save(prefixed(net.state_dict(), "_orig_mod.module."), path),
    "uncounted": lambda net, path: torch.save(
        {name: value for name, value in net.state_dict().items() if "num_batches" not in name}, path
    ),
    "safetensors": lambda net, path: save_file(
        {name: value.clone() for name, value in net.state_dict().items()}, path.with_suffix(".safetensors")
    ),
}


def test_gray_images_for_a_model_of_colours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mobilenet_v2(num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    found = loaded(tmp_path / "net.pt", model="torchvision.mobilenet_v2", shape=(1, 32, 32))
    x = torch.rand(3, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found(x), net(((x - MEAN[0]) / STD[0]).expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("kind", FILES)
def test_logits_are_bit_equal_to_those_of_the_model_that_was_saved(kind: str, masked: bool, tmp_path: Path) -> None:
    model = pruned(made()) if masked else made()
    path = tmp_path / "net.pt"
    FILES[kind](model.inner, path)
    before = torch.random.get_rng_state()
    found = loaded(path if kind != "safetensors" else path.with_suffix(".safetensors"))
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not found.training
    assert not any("_mask" in name or "_orig" in name for name in found.state_dict())
    if masked:
        assert sum(int((one == 0).sum()) for name, one in found.named_parameters() if "conv" in name) > 0


def test_half_precision_is_read_into_the_models_own(tmp_path: Path) -> None:
    model = made()
    torch.save({name: value.half() for name, value in model.inner.state_dict().items()}, tmp_path / "net.pt")
    found = loaded(tmp_path / "net.pt")
    assert {one.dtype for one in found.parameters()} == {torch.float32}
    for name, value in model.inner.named_parameters():
        assert torch.equal(found.get_parameter(f"inner.{name}"), value.half().float())


@given(st.dictionaries(st.sampled_from(["a.weight", "a.bias", "b.weight", "head"]), st.booleans(), min_size=1))
def test_masks_are_multiplied_in_and_nothing_else_changes(names: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(len(names))
    state, expected = {}, {}
    for name, masked in names.items():
        value = torch.randn(2, 3, generator=generator)
        mask = (torch.rand(2, 3, generator=generator) > 0.5).float()
        state |= {f"{name}_orig": value, f"{name}_mask": mask} if masked else {name: value}
        expected[name] = value * mask if masked else value
    kept = dict(state)
    found = plain_weights(state)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert state == kept


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def claiming(count: int) -> dict[str, Tensor]:
    """Return a mask and its weights that lie on one number each."""
    return {name: torch.ones(1).expand(count) for name in ("w_mask", "w_orig")}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "there is no such file"),
    "model": (lambda path: torch.save(made().inner, path), "holds more than tensors"),
    "garbage": (lambda path: path.write_bytes(b"root:x:0:0:root:/root\n"), "not a file of torch.save"),
    "nothing": (lambda path: path.write_bytes(b""), "not a file of torch.save"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "holds list, no state dict"),
    "empty": (lambda path: torch.save({}, path), "no state dict"),
    "optimizer": (lambda path: torch.save({"weights": {"a": torch.ones(1)}}, path), "weights is no tensor"),
    "names": (lambda path: torch.save({"conv.weight": torch.ones(2)}, path), r"missing \['.*unknown \['conv.weight'\]"),
    "mask": (lambda path: torch.save({"conv.weight_mask": torch.ones(2)}, path), "conv.weight_orig is not there"),
    "masks": (
        lambda path: torch.save({"w_mask": torch.ones(2), "w_orig": torch.ones(3)}, path),
        r"w_mask is a mask \(2,\), but w_orig is \(3,\)",
    ),
    "claim": (
        lambda path: torch.save(claiming(2**40), path),
        "w_orig claims 1,099,511,627,776 numbers",
    ),
    "sparse": (lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), "w: sparse, quantized"),
    "quantized": (
        lambda path: torch.save({"w": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)}, path),
        "w: sparse, quantized",
    ),
    "complex": (lambda path: torch.save({"w": torch.eye(2, dtype=torch.complex64)}, path), "w: sparse, quantized"),
    "meta": (lambda path: torch.save({"w": torch.empty(2, device="meta")}, path), "without values"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_state_dict_of_the_model_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    make(tmp_path / "net.pt")
    with pytest.raises(ModelError, match=message) as caught:
        loaded(tmp_path / "net.pt")
    assert "net.pt" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    FILES["plain" if suffix == ".pt" else "safetensors"](made().inner, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelError, match="truncated"):
        loaded(path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "net.pth", tmp_path / "owned"
    path.write_bytes(pickle.dumps({"state_dict": Hostile(target)}, protocol=2))
    with pytest.raises(ModelError, match=r"net\.pth"):
        loaded(path)
    torch.save({"state_dict": Hostile(target)}, path)
    with pytest.raises(ModelError, match="holds more than tensors"):
        loaded(path)
    assert not target.exists()


def test_what_does_not_fit_the_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    FILES["plain"](made().inner, path)
    with pytest.raises(ModelError, match=r"head.*has shape \(10, \d+\), the model \(7, \d+\)"):
        loaded(path, classes=7)
    with pytest.raises(UsageError, match="did you mean 'small_cnn'"):
        loaded(path, model="small_cn")
    with pytest.raises(UsageError, match="did you mean 'widths'"):
        loaded(path, model={"small_cnn": {"width": [4]}})
    with pytest.raises(UsageError, match="above 0"):
        loaded(path, std=(0.0,))
    with pytest.raises(ModelError, match="2 means"):
        loaded(path, mean=(0.1, 0.2))


def test_a_class_of_the_users_own_needs_trust(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"import pathlib\nfrom torch import nn\npathlib.Path({str(mark)!r}).touch()\n"
        "class Net(nn.Sequential):\n    'Mine.'\n"
        "    def __init__(self, classes: int) -> None:\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match=r"own\.py:Net is code"):
        loaded(tmp_path / "net.pt", model="own.py:Net", folder=tmp_path)
    assert not mark.exists()
    found = loaded(tmp_path / "net.pt", model="own.py:Net", folder=tmp_path, trust_plugins=True)
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(found(x), net((x - MEAN[0]) / STD[0]))


def test_names_that_the_model_itself_has_are_left_alone(tmp_path: Path) -> None:
    """`module.` is also what a network may call a part of its own."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.module = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n\n"
        "    def forward(self, x):\n        return self.module(x)\n"
    )
    weight, bias = torch.randn(10, 64), torch.randn(10)
    torch.save({"module.1.weight": weight, "module.1.bias": bias}, tmp_path / "net.pt")
    model = loaded(tmp_path / "net.pt", model="net.py:Net", folder=tmp_path, trust_plugins=True, mean=(0,), std=(1,))
    x = torch.rand(3, *SHAPE)
    assert torch.allclose(model(x), x.flatten(1) @ weight.T + bias, atol=1e-5)
