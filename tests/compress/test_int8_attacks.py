"""Quantized models under attack: what the surrogate shows, and what a wrong one, or one attack alone, would hide."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import robustkit
from robustkit.attacks.adaptive import Through
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Threat
from robustkit.cli.group import run as cli
from robustkit.compress.int8 import quantize
from robustkit.compress.lowering import lowered
from robustkit.data.load import load_dataset
from robustkit.evaluation.artefact import Beside, Setting, beside_surrogate
from robustkit.evaluation.attacked import clean_outcome
from robustkit.models.build import build_model
from robustkit.models.quantized import Quantized, round_trip
from robustkit.recipe.spec import Use

THREAT = Threat("linf", 0.1)
STEPS = Pgd(steps=40, restarts=2)
pytestmark = pytest.mark.slow


@dataclass
class Trained:
    """A float model, images to calibrate with, and test images x (N, 1, 8, 8) with labels y (N,)."""

    model: nn.Module
    calibration: Tensor
    x: Tensor
    y: Tensor

    def robust(self, quantized: Quantized, view: nn.Module) -> float:
        """Accuracy under pgd on a view; the quantized model judges."""
        attack = Through(STEPS, lambda _: view)
        return robustkit.evaluate(quantized, self.x, self.y, threat=THREAT, attacks={"pgd": attack}).worst.value


@pytest.fixture(scope="module")
def trained() -> Trained:
    data = load_dataset(Use(name="digits", parameters={}, label="digits"), validation=0.1)
    images, labels = data.train.floats(0, len(data.train)), data.train.labels
    torch.manual_seed(0)
    use = Use(name="small_cnn", parameters={"widths": [16, 32, 32]}, label="small_cnn")
    model = build_model(use, shape=(1, 8, 8), classes=10, mean=[0.3], std=[0.3])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for index in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return Trained(model.eval(), images[:512], data.test.floats(0, len(data.test)), data.test.labels)


def with_torchs_backward(quantized: Quantized) -> nn.Module:
    """The surrogate, but with torch's own fake quantization, whose gradient is zero where values were clipped."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(quantized.surrogate.graph, {}))
    changed = [node for node in graph.nodes if node.target is round_trip]
    for node in changed:
        node.target = torch.fake_quantize_per_tensor_affine
    assert changed
    return fx.GraphModule(quantized.surrogate, graph).eval()


def test_torchs_clipped_backward_overstates_robustness(trained: Trained) -> None:
    small = quantize(trained.model, trained.calibration)
    clipped = with_torchs_backward(small)
    with torch.no_grad():
        assert torch.equal(clipped(trained.x), small(trained.x))
    # Measured: 27.3 % against 20.4 %, on a model from another seed 31.8 % against 26.9 %.
    assert trained.robust(small, clipped) > trained.robust(small, small.surrogate) + 0.03


def beside(trained: Trained, small: Quantized) -> tuple[np.ndarray, Beside]:
    """What is right under pgd on the surrogate, and what else there is to try."""
    device = torch.device("cpu")
    found = robustkit.evaluate(small, trained.x, trained.y, threat=THREAT, attacks={"pgd": STEPS})
    clean = clean_outcome(small, trained.x, trained.y, batch_size=256, device=device)
    setting = Setting(trained.x, trained.y, THREAT, 0, 256, device)
    tried = beside_surrogate(
        small, trained.model, setting, clean=clean, surrogate=found.correct, crafted=[], queries=1000
    )
    return found.correct, tried


def test_at_four_bits_transfer_alone_is_blind(trained: Trained) -> None:
    surrogate, tried = beside(trained, quantize(trained.model, trained.calibration, bits=4))
    # Measured: 45 % withstand the float model's images, 6 % attacks on the surrogate.
    assert tried.transfer.correct.mean() > surrogate.mean() + 0.2
    assert tried.square.correct.mean() <= min(tried.transfer.correct.mean(), surrogate.mean())
    assert tried.disagreeing == 0


def test_at_two_bits_the_surrogate_alone_is_blind_too(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "runs" / "bits"
    recipe.write_text(
        "data: {digits: {}}\nmodel: {small_cnn: {widths: [16, 32]}}\nthreat: {norm: linf, eps: 0.1}\n"
        "train: {epochs: 5, batch_size: 64, optimizer: {adam: {lr: 3e-3}}}\nvariants:\n"
        "  robust: {defenses: [n_fgsm]}\n"
        "  after: {from: robust, compress: [int8: {bits: 2}]}\n"
        "  with: {from: robust, compress: [int8: {bits: 2, qat: true}], train: {epochs: 4}}\n"
        "evaluate: {examples: 150, attacks: [pgd: {steps: 20}], eps_curve: [0, 0.1], latency: false}\n"
    )
    arguments = ["run", str(recipe), "--runs", str(tmp_path / "runs"), "--name", "bits"]
    assert cli(arguments) == 0
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    # Trained with what it is rounded to, it keeps more, under the variant's own adversarial training.
    assert rows["with"]["clean"]["value"] > rows["after"]["clean"]["value"] + 0.1
    assert rows["with"]["worst"]["value"] > rows["after"]["worst"]["value"]
    assert rows["with"]["quantized"]["trained"]
    assert all(row["robust"] is not None for row in rows["with"]["epochs"])
    found = rows["with"]["quantized"]
    assert found["union"]["value"] < min(found["surrogate"]["value"], found["transfer"]["value"])
    assert any(flag["id"] == "int8-missed" for flag in rows["with"]["flags"])
    # The same weights again, from nothing.
    model = folder / rows["with"]["model"]
    before = model.read_bytes()
    shutil.rmtree(model.parent)
    assert cli(arguments) == 0
    assert model.read_bytes() == before


@pytest.mark.parametrize(("name", "shape"), [("resnet18", (3, 32, 32)), ("torchvision.mobilenet_v2", (3, 32, 32))])
def test_the_surrogate_of_deep_models_is_bit_equal(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    use = Use(name=name, parameters={}, label=name)
    model = build_model(use, shape=shape, classes=10, mean=[0.4] * 3, std=[0.3] * 3)
    x = torch.rand(16, *shape)
    with torch.no_grad():
        model(x)
    small = quantize(model.eval(), x)
    with torch.no_grad():
        assert torch.equal(small.surrogate(x), small(x))
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(small.surrogate(start).sum(), start)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_lowered_it_runs_in_kernels_of_bytes(trained: Trained) -> None:
    small = quantize(trained.model, trained.calibration)
    run = lowered(small)
    x = trained.x[:64]
    found = run(x)
    with torch.no_grad():
        expected = small(x)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
