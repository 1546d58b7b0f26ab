"""Grown models compute what the small ones do, before their first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robustkit.errors import ModelError, RecipeError
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.copied import Copies, copies, shared
from robustkit.models.grow import grow
from robustkit.models.grow_small import grow_small_cnn
from robustkit.models.normalized import Normalized
from robustkit.models.small_cnn import SmallCnn
from robustkit.recipe.schema import parse_recipe

SHAPE = (3, 16, 16)


def used(model: nn.Module) -> nn.Module:
    """A model with weights and statistics that are not those of a new one."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(32, *SHAPE)), torch.randint(5, (32,))).backward()
        optimizer.step()
    return model.eval()


def trained(widths: list[int]) -> SmallCnn:
    model = used(SmallCnn(SHAPE, 5, widths))
    assert isinstance(model, SmallCnn)
    return model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SMALLS: list[tuple[int, list[int], int]] = [
    (0, [4, 6, 6], 0), (0, [7, 6, 6], 0), (0, [9, 13, 20], 0), (0, [4, 6, 6], 1), (0, [5, 8, 7], 2), (1, [5, 8, 7], 2)
]  # fmt: skip


@pytest.mark.parametrize(("before", "widths", "after"), SMALLS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_larger_small_cnn_has_the_same_logits(before: int, widths: list[int], after: int, training: bool) -> None:
    torch.manual_seed(0)
    small, large = used(SmallCnn(SHAPE, 5, [4, 6, 6], before)), SmallCnn(SHAPE, 5, widths, after)
    grow(small, large, generator())
    x = torch.rand(16, *SHAPE)
    torch.testing.assert_close(large.train(training)(x), small.train(training)(x), atol=1e-5, rtol=0)


PLAIN: dict[str, Any] = {"widths": [4, 6], "hidden": 10}
BASELINES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"widths": [7, 9], "hidden": 16}),
    ({}, {"residual": True}),
    ({}, {"batch_norm": True}),
    ({}, {"extra": 2, "dropout": 0.5}),
    ({}, {"widths": [5, 9], "hidden": 11, "extra": 1, "batch_norm": True, "residual": True}),
    ({"extra": 1, "batch_norm": True, "residual": True}, {"widths": [5, 9], "hidden": 11, "extra": 3,
     "batch_norm": True, "residual": True}),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), BASELINES, ids=[str(number) for number in range(len(BASELINES))])
def test_a_larger_baseline_cnn_has_the_same_logits(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = used(BaselineCnn(SHAPE, 5, **{**PLAIN, **before}))
    large = BaselineCnn(SHAPE, 5, **{**PLAIN, **after}).eval()
    grow(small, large, generator(), torch.rand(64, *SHAPE))
    x = torch.rand(16, *SHAPE)
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=0)


def test_in_training_new_batch_norms_go_by_the_batch() -> None:
    """The identity holds in eval mode; in train mode it is as good as the batch stands for the measured images."""
    torch.manual_seed(0)
    small, images = used(BaselineCnn(SHAPE, 5, **PLAIN)), torch.rand(256, *SHAPE)
    large = BaselineCnn(SHAPE, 5, **PLAIN, batch_norm=True, extra=1)
    grow(small, large, generator(), images)
    large.train()
    whole, part = ((large(x) - small(x)).abs().mean() for x in (images, images[:8]))
    assert 1e-6 < whole < part < small(images).std()


def test_copies_share_the_weight_of_their_channel_unequally() -> None:
    weight, made = torch.tensor([[2.0, 6.0]]), Copies(torch.tensor([0, 1, 1]), torch.tensor([1, 0.25, 0.75]))
    assert shared(weight, made).tolist() == [[2.0, 1.5, 4.5]]
    found = copies(3, 9, generator())
    assert found.source[:3].tolist() == [0, 1, 2]
    torch.testing.assert_close(torch.zeros(3).index_add(0, found.source, found.part), torch.ones(3))
    assert len(set(found.part[found.source == 1].tolist())) == int((found.source == 1).sum())


def test_copied_channels_part_when_they_are_trained() -> None:
    torch.manual_seed(0)
    large = SmallCnn(SHAPE, 5, [8, 6]).eval()
    grow(trained([4, 6]), large, generator())
    kernels = large.groups[0].conv1.weight.flatten(1)
    alike = torch.cdist(kernels, kernels) + torch.eye(8)
    assert (alike.amin(1) < 1e-6).sum() >= 5
    used(large)
    kernels = large.groups[0].conv1.weight.flatten(1)
    assert (torch.cdist(kernels, kernels) + torch.eye(8)).min() > 1e-4


@pytest.mark.parametrize(("widths", "extra"), [([3, 6, 6], 1), ([4, 6], 1), ([4, 6, 6, 6], 1), ([4, 6, 6], 0)])
def test_models_that_cannot_grow(widths: list[int], extra: int) -> None:
    with pytest.raises(ModelError, match="small_cnn cannot grow from"):
        grow_small_cnn(SmallCnn(SHAPE, 5, [4, 6, 6], 1), SmallCnn(SHAPE, 5, widths, extra), torch.Generator())


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"residual": True}, {}, "residual: true"),
        ({"batch_norm": True}, {}, "batch_norm: true"),
        ({}, {"hidden": 9}, "shrink"),
        ({}, {"batch_norm": True}, "pass training images"),
    ],
)
def test_baselines_that_cannot_grow(before: dict[str, Any], after: dict[str, Any], words: str) -> None:
    models = [BaselineCnn(SHAPE, 5, **{**PLAIN, **values}) for values in (before, after)]
    with pytest.raises(ModelError, match=words):
        grow(*models, generator())


def test_a_grown_recipe_model_normalizes_like_the_small_one() -> None:
    small = Normalized(trained([4, 6]), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).eval()
    large = Normalized(SmallCnn((3, 16, 16), 5, [8, 9]), [0.0] * 3, [1.0] * 3).eval()
    grow(small, large, torch.Generator().manual_seed(1))
    x = torch.rand(4, 3, 16, 16)
    assert torch.allclose(small(x), large(x), atol=1e-5)


def recipe(data: str, before: str, after: str) -> str:
    return (
        f"data: {data}\nmodel: small_cnn\nvariants:\n  small: {{model: {before}}}\n"
        f"  large: {{from: small, model: {after}, train: {{epochs: 1}}}}\n"
    )


def test_a_recipe_may_grow_its_parent() -> None:
    found = parse_recipe(recipe("digits", "{small_cnn: {widths: [4, 6]}}", "{small_cnn: {widths: [8, 6], extra: 1}}"))
    assert found.variant("large").model.parameters["widths"] == [8, 6]
    found = parse_recipe(recipe("digits", "baseline_cnn", "{baseline_cnn: {batch_norm: true, widths: [64, 200]}}"))
    assert found.variant("large").model.parameters["batch_norm"] is True


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("small_cnn: {widths: [4, 6]}", "{small_cnn: {widths: [3, 6]}}", "cannot grow from widths [4, 6] to [3, 6]"),
        ("small_cnn: {widths: [64, 6]}", "small_cnn", "cannot grow from widths [64, 6] to [32, 64, 64]"),
        ("small_cnn: {widths: [4, 6]}", "resnet18", "small_cnn and baseline_cnn grow"),
        ("small_cnn: {extra: 2}", "{small_cnn: {extra: 1}}", "cannot grow from extra 2 to 1"),
        ("baseline_cnn: {residual: true}", "baseline_cnn", "cannot grow out of its `residual`"),
        ("baseline_cnn: {widths: [70, 80]}", "baseline_cnn", "cannot grow into a smaller one"),
        ("baseline_cnn", "small_cnn", "small_cnn and baseline_cnn grow"),
    ],
)
def test_a_recipe_that_cannot_grow_says_where(before: str, after: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe("{digits: {size: 28}}", f"{{{before}}}" if ":" in before else before, after))
    assert words in str(caught.value)
    assert ":5:" in str(caught.value)


def test_a_whitened_small_cnn_grows_deeper_too() -> None:
    torch.manual_seed(0)
    small = SmallCnn((1, 16, 16), 10, widths=[4, 6], whiten="frozen").eval()
    large = SmallCnn((1, 16, 16), 10, widths=[6, 8], whiten="frozen", extra=1).eval()
    images = torch.rand(32, 1, 16, 16)
    grow_small_cnn(small, large, torch.Generator().manual_seed(0))
    assert torch.allclose(small(images), large(images), atol=1e-5)
    with pytest.raises(ModelError, match="whiten"):
        grow_small_cnn(small, SmallCnn((1, 16, 16), 10, widths=[6, 8]), torch.Generator())
