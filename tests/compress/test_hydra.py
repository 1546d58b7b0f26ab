"""Learned scores: the straight-through gradient, and weights that matter kept where their size misleads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.compress.base import CompressContext
from robustkit.compress.hydra import Hydra, Learned
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import prunable, sparsity_of
from robustkit.compress.prune import GlobalL1, LayerL1
from robustkit.data.split import Split, split_of
from robustkit.errors import ModelError
from robustkit.models.small_cnn import SmallCnn
from robustkit.train.hooks import Batch, Defense, Step

THREAT = Threat("linf", 0.1)


def test_scores_take_the_gradient_of_the_mask_times_the_weight() -> None:
    weight = torch.tensor([[0.5, -2.0, 1.0, 0.1]])
    learned = Learned(weight, torch.tensor([[1.0, 1.0, 0.0, 1.0]]), 2)
    assert torch.allclose(learned.scores.detach(), weight / 2 * (6 / 4) ** 0.5)
    masked = learned(weight)
    assert masked.tolist() == [[0.5, -2.0, 0.0, 0.0]]
    masked.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert learned.scores.grad is not None
    assert torch.allclose(learned.scores.grad, torch.tensor([[0.5, 2 * -2.0 * -1, 0.0, 0.4]]))


def misleading() -> tuple[nn.Sequential, Split]:
    """Pixel 0 is the label; the large weights read noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    images = torch.randint(0, 256, (256, 1, 2, 2), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = (labels * 255).to(torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-0.5, 0.9, -1.0, 0.8], [0.5, -0.8, 0.9, 1.0]]))
        model[1].bias.zero_()
    return model, split_of(images, labels)


def keeper(method: object, train: Split | None, *defenses: Defense, side: int = 2) -> MaskKeeper:
    named = [(str(number), defense) for number, defense in enumerate(defenses)]
    example = torch.zeros(2, 1, side, side)
    return MaskKeeper(
        [method], inherit=False, context_seed=0, example=example, threat=THREAT, train=train, defenses=named
    )


def kept(model: nn.Sequential) -> list[list[int]]:
    weight = model[1].weight
    assert isinstance(weight, Tensor)
    return (weight != 0).int().tolist()


def test_what_matters_is_kept_where_size_misleads() -> None:
    model, train = misleading()
    keeper(LayerL1(0.75), train).compress(model)
    assert kept(model) == [[0, 0, 1, 0], [0, 0, 0, 1]]
    models = []
    for _ in range(2):
        model, train = misleading()
        held = keeper(Hydra(0.75, epochs=5, batch_size=32), train)
        held.finish(held.compress(model))
        models.append(kept(model))
    assert models[0] == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert models[0] == models[1]


class Blinded(Defense):
    """Hides pixel 0 from the training, and counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def perturb(self, batch: Batch, step: Step) -> Tensor:
        self.steps += 1
        x = batch.x.clone()
        x[:, :, 0, 0] = 0
        return x


def test_scores_are_learned_with_the_defenses_loss_and_leave_them_alone() -> None:
    model, train = misleading()
    blinded = Blinded()
    before = copy.deepcopy(model)
    keeper(Hydra(0.75, epochs=5, batch_size=32), train, blinded).compress(model)
    assert all(row[0] == 0 for row in kept(model)), "what the defense hides cannot be learned"
    assert blinded.steps == 0
    weight, first = model[1].weight, before[1].weight
    assert isinstance(weight, Tensor)
    assert torch.equal(weight, first * (weight != 0))


def test_hydra_reaches_its_sparsity_and_needs_images() -> None:
    torch.manual_seed(0)
    model = SmallCnn((1, 8, 8), 10, [8, 16]).train()
    drawn = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    state = copy.deepcopy(dict(model.named_buffers()))
    held = keeper(Hydra(0.9, epochs=1), split_of(drawn, torch.arange(40) % 10), side=8)
    held.prepare_model(model)
    held.finish(model)
    assert sparsity_of(model) == pytest.approx(0.9, abs=1e-3)
    assert all(bool(weight.any()) for _, weight in prunable(model))
    assert all(torch.equal(state[name], value) for name, value in model.named_buffers())
    context = CompressContext(torch.zeros(2, 1, 8, 8), torch.Generator(), THREAT)
    with pytest.raises(ModelError, match="hydra needs training images"):
        Hydra(0.9).masks(model, held.masks, 0.9, context)


def test_layers_lose_what_magnitude_takes_of_each() -> None:
    torch.manual_seed(0)
    model = SmallCnn((1, 8, 8), 10, [8, 16])
    with torch.no_grad():
        model.head.weight.mul_(10)
    train = split_of(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10)
    kept = {}
    for method in (
        GlobalL1(0.9, max_layer_sparsity=0.999),
        Hydra(0.9, epochs=1, layers="magnitude"),
        Hydra(0.9, epochs=1),
    ):
        pruned = copy.deepcopy(model)
        held = keeper(method, train, side=8)
        held.finish(held.compress(pruned))
        assert sparsity_of(pruned) == pytest.approx(0.9, abs=1e-3)
        kept[str(method)] = [int((weight != 0).sum()) for _, weight in prunable(pruned)]
    magnitude, learned, equal = kept.values()
    assert learned == magnitude
    assert magnitude[-1] > 100 > equal[-1], "the head's weights are ten times as large"


def test_no_layer_loses_more_than_it_may() -> None:
    torch.manual_seed(0)
    model = SmallCnn((1, 8, 8), 10, [8, 16])
    train = split_of(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10)
    with pytest.raises(ModelError, match=r"max_layer_sparsity=0\.8"):
        keeper(Hydra(0.9, epochs=1, max_layer_sparsity=0.8), train, side=8).compress(model)
    keeper(Hydra(0.9, epochs=1, layers="magnitude", max_layer_sparsity=0.91), train, side=8).compress(model)
    assert sparsity_of(model) == pytest.approx(0.9, abs=1e-3)
    assert all(int((weight == 0).sum()) <= 0.91 * weight.numel() + 1 for _, weight in prunable(model))
