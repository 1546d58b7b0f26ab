"""Grown models compute what the small ones do, before their first step."""

from __future__ import annotations

import pytest
import torch

from robustkit.errors import ModelError, RecipeError
from robustkit.models.grow import copies, grow, grow_small_cnn, shared
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.schema import parse_recipe


def trained(widths: list[int]) -> SmallCnn:
    model = SmallCnn((3, 16, 16), 5, widths)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


@pytest.mark.parametrize("widths", [[4, 6, 6], [7, 6, 6], [9, 13, 20]])
def test_a_wider_model_has_the_same_logits(widths: list[int]) -> None:
    torch.manual_seed(0)
    small, large = trained([4, 6, 6]), SmallCnn((3, 16, 16), 5, widths).eval()
    grow_small_cnn(small, large, torch.Generator().manual_seed(0))
    x = torch.rand(16, 3, 16, 16)
    assert torch.allclose(small(x), large(x), atol=1e-5)


def test_copies_share_the_weight_of_their_channel() -> None:
    weight = torch.tensor([[2.0, 6.0]])
    assert shared(weight, torch.tensor([0, 1, 1])).tolist() == [[2.0, 3.0, 3.0]]
    assert copies(3, 5, torch.Generator().manual_seed(0))[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("widths", [[3, 6, 6], [4, 6], [4, 6, 6, 6]])
def test_models_that_cannot_grow(widths: list[int]) -> None:
    with pytest.raises(ModelError, match="cannot grow from widths"):
        grow_small_cnn(trained([4, 6, 6]), SmallCnn((3, 16, 16), 5, widths), torch.Generator())


def test_a_grown_recipe_model_normalizes_like_the_small_one() -> None:
    small = Normalized(trained([4, 6]), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).eval()
    large = Normalized(SmallCnn((3, 16, 16), 5, [8, 9]), [0.0] * 3, [1.0] * 3).eval()
    grow(small, large, torch.Generator().manual_seed(1))
    x = torch.rand(4, 3, 16, 16)
    assert torch.allclose(small(x), large(x), atol=1e-5)


def recipe(variant: str) -> str:
    small = "{model: {small_cnn: {widths: [4, 6]}}}"
    return f"data: digits\nmodel: small_cnn\nvariants:\n  small: {small}\n  large: {variant}\n"


def test_a_recipe_may_grow_its_parent() -> None:
    found = parse_recipe(recipe("{from: small, model: {small_cnn: {widths: [8, 6]}}, train: {epochs: 1}}"))
    assert found.variant("large").model.parameters["widths"] == [8, 6]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{small_cnn: {widths: [3, 6]}}", "cannot grow from widths [4, 6] to [3, 6]"),
        ("small_cnn", "cannot grow from widths [4, 6] to [32, 64, 64]"),
        ("resnet18", "only small_cnn grows"),
    ],
)
def test_a_recipe_that_cannot_grow_says_where(model: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(f"{{from: small, model: {model}, train: {{epochs: 1}}}}"))
    assert words in str(caught.value)
    assert ":5:" in str(caught.value)
