"""Dropout surgery: in while training, invisible in eval mode, gone afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from robustkit.defenses.dropout import Dropout, insert_dropout, places, remove_dropout
from robustkit.errors import UsageError
from robustkit.models.build import build_model
from robustkit.recipe.spec import Use

SHAPE = (3, 32, 32)
MODELS: dict[str, dict[str, Any]] = {
    "small_cnn": {"widths": [8, 8, 8]},
    "baseline_cnn": {},
    "resnet18": {},
    "torchvision.mobilenet_v3_small": {},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    use = Use(name=name, parameters=MODELS[name], label=name)
    return build_model(use, shape=SHAPE, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that surgery may leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    return {"modules": [name for name, _ in model.named_modules()], "hooks": hooks, "attributes": attributes}


@pytest.mark.parametrize("conv", [0.0, 0.2])
@pytest.mark.parametrize("name", MODELS)
def test_surgery_on_every_model(name: str, conv: float) -> None:
    plain = build(name)
    before, keys = trace(plain), list(plain.state_dict())
    expected = [parameter_name for parameter_name, _ in plain.named_parameters()]
    x = torch.rand(4, *SHAPE)
    reference = copy.deepcopy(plain).eval()(x)

    model = Dropout(p=0.5, conv=conv).prepare_model(plain)
    assert list(model.state_dict()) == keys
    assert [parameter_name for parameter_name, _ in model.named_parameters()] == expected
    assert torch.equal(model.eval()(x), reference)
    # Only the inserted dropout trains: nothing else in the model may be what makes outputs differ.
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d) and module in inserted(model):
            module.train()
    assert not torch.equal(model(x), model(x))

    copied = remove_dropout(copy.deepcopy(model))
    assert trace(copied)["hooks"] == before["hooks"]
    assert len(inserted(model)) > 0, "removing from the copy removed from the original"
    restored = Dropout().restore_model(model)
    assert trace(restored) == before
    assert torch.equal(restored.eval()(x), reference)


def inserted(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("inserted_dropout")]


def test_p_is_the_share_of_hidden_inputs_that_is_dropped() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4000), nn.ReLU(), nn.Linear(4000, 4000, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(1.0)
        model[3].weight.copy_(torch.eye(4000))
    insert_dropout(model, p=0.3).train()
    torch.manual_seed(0)
    out = model(torch.rand(2, 16))
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 1 / 0.7))


def test_the_image_itself_is_never_dropped() -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    assert places(mlp)[0] == [mlp[3]]


def test_conv_drops_whole_channels_behind_the_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.Flatten())
    assert places(model)[1] == [model[1], model[3]]
    insert_dropout(model, p=0.0, conv=0.5)
    hidden: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda _, __, output: hidden.append(output))
    model(torch.rand(2, 1, 6, 6))
    zero = (hidden[0] == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2)), "a channel was dropped in part"
    assert 0.2 < zero.all(2).float().mean() < 0.8


def test_models_without_a_place_are_refused() -> None:
    with pytest.raises(UsageError, match="no hidden layer"):
        insert_dropout(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), p=0.3)
    convolutional = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="set conv"):
        insert_dropout(convolutional, p=0.3)
    with pytest.raises(UsageError, match="no convolution"):
        insert_dropout(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), p=0.3, conv=0.1)
    assert trace(insert_dropout(convolutional, p=0.3, conv=0.3))["hooks"][1] == (1, 0)


def test_a_second_insertion_is_refused() -> None:
    model = insert_dropout(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), p=0.3)
    with pytest.raises(UsageError, match="once"):
        insert_dropout(model, p=0.3)


def test_a_state_dict_of_the_plain_model_fits() -> None:
    plain = torchvision.models.mobilenet_v3_small(num_classes=10)
    model = insert_dropout(torchvision.models.mobilenet_v3_small(num_classes=10), p=0.3, conv=0.1)
    model.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_gradients_flow_through_surgery_in_a_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = insert_dropout(
        nn.Sequential(nn.Conv2d(1, 8, 2, 2), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, 8), layer), p=0.5
    )
    assert [name for name, _ in model.named_modules() if name.endswith("inserted_dropout")] == [
        "3.inserted_dropout",
        "4.linear1.inserted_dropout",
        "4.linear2.inserted_dropout",
    ]
    model(torch.rand(2, 1, 4, 4)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(2, 1, 4, 4)), remove_dropout(model)(torch.ones(2, 1, 4, 4)))
