"""First weights from the data and from the identity: what the layers compute with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from robustkit.data.load import load_dataset
from robustkit.errors import ModelError, RecipeError
from robustkit.models.artefact import load_model
from robustkit.models.grow_small import grow_small_cnn
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.models.whitening import Whitening, start_as_identity, whiten_, whitening_filters
from robustkit.pipeline import run
from robustkit.recipe.schema import parse_recipe


def photographs() -> Tensor:
    """Images of three channels whose pixels are correlated in space and between channels."""
    digits = torch.from_numpy(load_digits().images[:900]).float().view(300, 3, 8, 8) / 16
    return functional.interpolate(digits + 0.3 * digits.mean(1, keepdim=True), scale_factor=2, mode="bilinear")


def test_whitened_patches_are_uncorrelated_at_unit_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.models.whitening.FLOOR", 0.0)
    images = photographs()
    filters = whitening_filters(images)
    assert filters.shape == (12, 3, 2, 2)
    found = functional.conv2d(images, filters).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(torch.cov(found), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-2)


def test_the_layer_sees_what_the_model_sees_and_has_both_signs() -> None:
    images = (photographs() / photographs().max() * 255).to(torch.uint8)
    model = Normalized(SmallCnn((3, 16, 16), 10, [8, 8], whiten="frozen"), [0.4, 0.3, 0.2], [0.2, 0.3, 0.4])
    whiten_(model, images)
    normalized = (images / 255 - model.mean) / model.std
    wanted = whitening_filters(normalized)
    layer = model.inner.whitening
    assert isinstance(layer, Whitening)
    torch.testing.assert_close(layer.conv.weight[:12], wanted)
    assert torch.equal(layer.conv.weight[12:], -layer.conv.weight[:12])
    assert layer.conv.bias is not None
    assert not layer.conv.bias.any()
    assert not layer.conv.weight.requires_grad
    assert layer.conv.bias.requires_grad
    assert model(images / 255).shape == (300, 10)


def test_identity_filters_pass_their_channels_on() -> None:
    x = torch.rand(2, 3, 6, 6)
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    drawn = convolution.weight.detach().clone()
    start_as_identity(convolution)
    torch.testing.assert_close(convolution(x)[:, :3], x)
    assert torch.equal(convolution.weight[3:], drawn[3:])
    model = SmallCnn((3, 8, 8), 10, [8, 16], dirac=True)
    first = model.groups[0]
    torch.testing.assert_close(first.conv2(torch.ones(1, 8, 4, 4)), torch.ones(1, 8, 4, 4))  # type: ignore[operator, union-attr]


def test_defaults_have_neither() -> None:
    torch.manual_seed(0)
    plain = SmallCnn((3, 8, 8), 10, [8])
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert torch.equal(plain.groups[0].conv1.weight, first.weight)  # type: ignore[union-attr]
    assert not any("whitening" in name for name in plain.state_dict())


def test_growth_keeps_the_whitening() -> None:
    small, large = (SmallCnn((1, 8, 8), 10, [4, 4 + extra], whiten="trained").eval() for extra in (0, 3))
    grow_small_cnn(small, large, torch.Generator().manual_seed(0))
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(small(x), large(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="whiten"):
        grow_small_cnn(small, SmallCnn((1, 8, 8), 10, [4, 7]), torch.Generator())
    text = (
        "data: digits\nmodel: {small_cnn: {widths: [4]}}\n"
        "variants: {a: , b: {from: a, model: {small_cnn: {widths: [4], whiten: frozen}}, train: {epochs: 1}}}"
    )
    with pytest.raises(RecipeError, match="whiten"):
        parse_recipe(text)


@pytest.mark.slow
def test_a_recipe_whitens_with_its_training_images_and_leaves_frozen_filters_alone(tmp_path: Path) -> None:
    text = (
        "data: {digits: {limit: 200}}\nmodel: {small_cnn: {widths: [4], whiten: frozen, dirac: true}}\n"
        "train: {epochs: 1, batch_size: 64}\nvariants: {a: {defenses: [n_fgsm]}}\n"
        "evaluate: {examples: 20, attacks: [noise], latency: false, gallery: 0}"
    )
    run(parse_recipe(text), tmp_path / "run")
    (path,) = (tmp_path / "run").glob("steps/*/model.safetensors")
    model = load_model(path)
    data = load_dataset(parse_recipe(text).data, validation=0.1)
    layer = model.inner.whitening  # type: ignore[union-attr]
    wanted = whitening_filters((data.train.images / 255 - model.mean) / model.std)  # type: ignore[operator]
    torch.testing.assert_close(layer.conv.weight[:4], wanted)  # type: ignore[union-attr, index]
