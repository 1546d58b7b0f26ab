"""Sensitivity scans: exactly one layer is pruned, and what is measured is what that model does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.compress.layer_curves import LayerCurve, Sensitivity
from robustkit.compress.sensitivity import METHODS, layer_sensitivity
from robustkit.data.split import split_of
from robustkit.errors import UsageError
from robustkit.report.sensitivity import drawn, sensitivity_figure, table
from robustkit.stats import clopper_pearson

THREAT = Threat("linf", 0.1)


def told_by_the_first() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Two layers: the first reads the label off pixel 0 by its one large weight, the second only passes it on."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.tensor([0.1, 4.0, 5.0, 6.0])))
        model[2].weight.copy_(torch.tensor([[0.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0]]))
    labels = torch.arange(40) % 2
    images = torch.zeros(40, 1, 2, 2)
    # Class 1 is the sign of 0.1 * 9 * pixel 0: 0.9 p > 0. All else adds the same to both.
    images[:, 0, 0, 0] = labels * 0.5
    return model, images, labels


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_one_layer_alone_is_pruned_and_the_rest_is_as_it_was() -> None:
    model, x, y = told_by_the_first()
    before = copy.deepcopy(model.state_dict())
    seen: list[tuple[int, int]] = []
    found = layer_sensitivity(
        model, x, y, THREAT, sparsities=[0.5, 0.8, 0.9], on_progress=lambda done, total: seen.append((done, total))
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert seen == [(number, 6) for number in range(1, 7)]
    assert (found.clean.value, found.clean.n) == (1.0, 40)
    first, second = found.layers
    assert (first.name, first.size, second.name, second.size) == ("1.weight", 16, "2.weight", 8)
    # 12 of 16 weights are zero already: half changes nothing, 80 % takes the 0.1 that tells the classes apart.
    assert first.clean == [1.0, 0.5, 0.5]
    # Half of the second layer's weights are ones and a zero; its 9 is the last to go.
    assert second.clean == [1.0, 1.0, 1.0]
    assert first.attacked[0] == found.attacked.value


def test_attacked_accuracy_is_that_of_the_pruned_model_under_the_attack() -> None:
    model, x, y = told_by_the_first()
    large, small = (layer_sensitivity(model, x, y, Threat("linf", eps), sparsities=[0.5, 0.9]) for eps in (0.4, 1e-3))
    # Pixel 0 is at 0.5 for class 1 and at 0 for class 0, where any rise gives class 1.
    assert large.attacked.value == small.attacked.value == 0.5
    assert small.layers[0].attacked == [0.5, 0.5]
    assert layer_sensitivity(model, x, y, Threat("linf", 0.6), sparsities=[0.5]).attacked.value == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scans_every_layer(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)
    ).eval()
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(20) % 10
    train = split_of(images, labels)
    found = layer_sensitivity(model, images, labels, THREAT, method=method, sparsities=[0.5], train=train)
    channels = method.startswith("channel_")
    assert [(one.name, one.size) for one in found.layers] == (
        [("0", 4), ("4", 8)] if channels else [("0.weight", 36), ("4.weight", 128), ("6.weight", 80)]
    )
    assert all(len(one.clean) == len(one.attacked) == 1 for one in found.layers)


@pytest.mark.parametrize(
    ("method", "sparsities", "message"),
    [
        ("hydra", [0.5], "'hydra' cannot be scanned layer by layer; one of global_l1, .*channel_random can"),
        ("global_l1", [0.5, 1.0], r"between 0 and 1.*not \[0.5, 1.0\]"),
        ("global_l1", [], "between 0 and 1"),
    ],
)
def test_what_cannot_be_scanned_is_said(method: str, sparsities: list[float], message: str) -> None:
    model, x, y = told_by_the_first()
    with pytest.raises(UsageError, match=message):
        layer_sensitivity(model, x, y, THREAT, method=method, sparsities=sparsities)


def scan() -> Sensitivity:
    return Sensitivity(
        method="global_l1",
        threat={"norm": "linf", "eps": 0.1},
        sparsities=[0.9, 0.5, 0.8],
        clean=clopper_pearson(90, 100),
        attacked=clopper_pearson(60, 100),
        layers=[
            LayerCurve(name="_conv$1", size=2304, clean=[0.3, 0.9, 0.8], attacked=[0.61, 0.59, 0.57]),
            LayerCurve(name="head", size=640, clean=[0.9, 0.9, 0.9], attacked=[0.2, 0.55, 0.6]),
        ],
    )


def test_the_chart_has_a_line_a_sparsity_and_the_table_says_what_a_layer_bears() -> None:
    found = scan()
    clean, attacked = sensitivity_figure(found).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in attacked.lines}
    assert lines["90 %"] == pytest.approx([61, 20])
    assert lines["50 %"] == pytest.approx([59, 55])
    assert {line.get_label(): list(line.get_ydata()) for line in clean.lines}["80 %"] == pytest.approx([80, 90])
    rows = table(found).splitlines()
    assert rows[2] == "| (nothing pruned) |  | 60.0 (90.0) | 60.0 (90.0) | 60.0 (90.0) |  |"
    # 80 % costs it more than 2 points, so that 90 %, which does not, is not borne.
    assert rows[3] == "| _conv$1 | 2.3 k | 61.0 (30.0) | 59.0 (90.0) | 57.0 (80.0) | 50 % |"
    assert rows[4].endswith("| none of these |")
    assert drawn(found, "svg") == drawn(found, "svg")
    assert drawn(found, "svg").startswith(b"<svg")
    assert drawn(found, "png").startswith(b"\x89PNG")
