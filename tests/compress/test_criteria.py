"""Importance scores against closed forms and brute force; methods that look at training images only."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from robustkit.attacks.threat import Threat
from robustkit.compress.base import CompressContext
from robustkit.compress.criteria import (
    grasp_scores,
    lamp_scores,
    ranks,
    scoring,
    snip_scores,
    synflow_scores,
    taylor_scores,
)
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import Masks, prunable, sparsity_of
from robustkit.compress.scored import Grasp, Lamp, Scored, Snip, Synflow, Taylor, batches_of
from robustkit.compress.semistructured import NM, n_m_mask
from robustkit.data.split import split_of
from robustkit.errors import ModelError
from robustkit.models.small_cnn import SmallCnn
from robustkit.train.hooks import Step

THREAT = Threat("linf", 0.1)


def network() -> SmallCnn:
    torch.manual_seed(0)
    return SmallCnn((1, 8, 8), 10, [8, 16])


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))


def batch(count: int = 8, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 1, side, side, generator=generator), torch.arange(count) % 3


def keeper(method: object, inherit: bool = False) -> MaskKeeper:
    drawn = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    train = split_of(drawn, torch.arange(40) % 10)
    return MaskKeeper(
        [method], inherit=inherit, context_seed=0, example=torch.zeros(2, 1, 8, 8), threat=THREAT, train=train
    )


def test_lamp_is_the_papers_formula() -> None:
    model = linear()
    weight = model[1].weight.detach()
    flat = weight.flatten().double()
    wanted = [float(w**2 / sum(v**2 for v in flat if abs(v) >= abs(w))) for w in flat]
    (found,) = lamp_scores(model).values()
    assert found.flatten().tolist() == pytest.approx(wanted)
    assert float(found.max()) == 1.0


def test_snip_and_taylor_are_the_gradient_of_a_linear_model_by_hand() -> None:
    model = linear()
    x, y = batch(side=2)
    weight = model[1].weight.detach()

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        wrong = (x.flatten(1) @ weight.T).softmax(1) - functional.one_hot(y, 3)
        return wrong.T @ x.flatten(1) / len(y)

    (snip,) = snip_scores(model, [(x[:6], y[:6]), (x[6:], y[6:])]).values()
    assert torch.allclose(snip, (weight * gradient(x, y)).abs(), atol=1e-7)
    (taylor,) = taylor_scores(model, [(x[:4], y[:4]), (x[4:], y[4:])]).values()
    wanted = sum((weight * gradient(x[half], y[half])).square() for half in (slice(0, 4), slice(4, 8))) / 2
    assert torch.allclose(taylor, wanted, atol=1e-7)


def test_grasp_is_the_slope_of_the_gradients_norm() -> None:
    """w (H g) is half of what the squared norm of the gradient loses to first order when w shrinks."""
    model = linear().double()
    x, y = batch(side=2)
    x = x.double()
    weight = model[1].weight.detach().clone()

    def squared_norm(weight: Tensor) -> Tensor:
        wrong = (x.flatten(1) @ weight.T / 2).softmax(1) - functional.one_hot(y, 3)
        return ((wrong.T @ x.flatten(1)) / 2 / len(y)).square().sum()

    with torch.no_grad():
        (found,) = grasp_scores(model, [(x, y)], 2.0).values()
    step = 1e-5
    for place in range(weight.numel()):
        up, down = weight.clone(), weight.clone()
        up.view(-1)[place] += step
        down.view(-1)[place] -= step
        slope = (squared_norm(up) - squared_norm(down)) / (2 * step)
        # The loss is taken in single precision.
        assert float(found.view(-1)[place]) == pytest.approx(
            len(y) * float(weight.view(-1)[place] * slope / 2), rel=1e-3, abs=1e-6
        )


def test_synflow_is_the_product_over_paths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    a, b = model[1].weight.detach().abs().double(), model[3].weight.detach().abs().double()
    first, second = synflow_scores(model, Masks(), torch.zeros(2, 1, 2, 2)).values()
    assert torch.allclose(first, a * b.sum(0)[:, None])
    assert torch.allclose(second, b * a.sum(1)[None])
    assert float(first.sum()) == pytest.approx(float(second.sum())), "what flows is conserved from layer to layer"


def test_ranks_keep_the_order_over_layers() -> None:
    found = ranks({"a": torch.tensor([-3.0, 5.0]), "b": torch.tensor([[0.0, -7.0]])})
    assert found["a"].tolist() == [2, 4]
    assert found["b"].tolist() == [[3, 1]]


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = network().train()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    with torch.no_grad(), scoring(model):
        assert torch.is_grad_enabled()
        model(x)
    snip_scores(model, [(x, y)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def rounds(kind: type[Scored], sparsity: float) -> Scored:
    return Synflow(sparsity, rounds=5) if kind is Synflow else kind(sparsity)


@pytest.mark.parametrize("kind", [Lamp, Snip, Grasp, Synflow, Taylor])
@pytest.mark.parametrize("sparsity", [0.5, 0.93])
def test_the_sparsity_reached_is_what_was_asked(kind: type[Scored], sparsity: float) -> None:
    model, again = network(), network()
    for one in (model, again):
        held = keeper(rounds(kind, sparsity))
        held.finish(held.compress(one))
    total = sum(weight.numel() for _, weight in prunable(model))
    assert abs(sparsity_of(model) * total - sparsity * total) <= 1
    assert all(bool(weight.any()) for _, weight in prunable(model))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    child = keeper(rounds(kind, 0.97), inherit=True)
    zero = {name: weight == 0 for name, weight in prunable(model)}
    child.finish(child.compress(model))
    assert all(not bool(weight[zero[name]].any()) for name, weight in prunable(model))


@pytest.mark.parametrize("kind", [Snip, Grasp, Taylor])
def test_scores_grow_with_a_schedule(kind: type[Scored]) -> None:
    model = network()
    held = keeper(kind(0.8, "cubic", end=1.0, updates=3))
    held.prepare_model(model)
    seen = []
    for number in range(4):
        held.after_step(Step(model, 0, 1, number / 3, THREAT, torch.Generator()))
        seen.append(sparsity_of(model))
    assert seen == sorted(seen)
    assert len(set(seen)) == 4
    held.finish(model)


@pytest.mark.parametrize("kind", [Lamp, Snip, Grasp, Synflow, Taylor])
def test_scores_are_of_masked_weights_whatever_the_optimizer_did_to_the_dropped_ones(kind: type[Scored]) -> None:
    """Momentum moves weights whose gradient is zero, before the masks are applied again."""
    seen = []
    for moved in (0.0, 0.3):
        model = network()
        held = keeper(kind(0.8, "cubic", end=1.0, updates=2))
        held.prepare_model(model)
        held.after_step(Step(model, 0, 1, 0.5, THREAT, torch.Generator()))
        assert 0.4 < sparsity_of(model) < 0.8
        with torch.no_grad():
            for _, weight in prunable(model):
                weight += moved * (weight == 0)
        held.after_step(Step(model, 0, 1, 1.0, THREAT, torch.Generator()))
        assert sparsity_of(model) == pytest.approx(0.8, abs=1e-3)
        seen.append(held.masks)
    assert all(torch.equal(mask, seen[1].tensors[name]) for name, mask in seen[0].tensors.items())


@pytest.mark.parametrize("kind", [Lamp, Snip, Grasp, Synflow, Taylor])
def test_weights_under_spectral_norm_have_scores(kind: type[Scored]) -> None:
    """Of the weights as they are computed: those of a plain model with the same ones."""
    model = network()
    for module in (model.groups[0].conv1, model.head):
        spectral_norm(module)  # type: ignore[arg-type]
    model.eval()
    plain = network().eval()
    plain.load_state_dict({name: dict(prunable(model)).get(name, value) for name, value in plain.state_dict().items()})
    found, expected = (
        kind(0.5).scores(one, Masks(), keeper(Lamp(0.5))._context(one))
        if kind is not Synflow
        else synflow_scores(one, Masks(), torch.zeros(2, 1, 8, 8))
        for one in (model, plain)
    )
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4) for name in found)
    held = keeper(kind(0.8, "cubic", end=1.0, updates=2))
    held.prepare_model(model.train())
    for number in range(3):
        held.after_step(Step(model, 0, 1, number / 2, THREAT, torch.Generator()))
    assert sparsity_of(model) == pytest.approx(0.8, abs=1e-3)


class Spare(nn.Module):
    """A classifier with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.spare = network(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.called(x)
        return found


@pytest.mark.parametrize("kind", [Snip, Grasp, Synflow, Taylor])
def test_a_layer_that_nothing_calls_matters_to_nothing(kind: type[Scored]) -> None:
    torch.manual_seed(0)
    model = Spare()
    held = keeper(kind(0.5, max_layer_sparsity=0.75))
    held.compress(model)
    if kind is not Grasp:
        assert int((model.spare.weight == 0).sum()) == 12
    assert sparsity_of(model) == pytest.approx(0.5, abs=1e-3)


def test_a_lone_last_image_is_left_out() -> None:
    context = keeper(Lamp(0.5))._context(network())
    assert [len(y) for _, y in batches_of(context, 40, 13)] == [13, 13, 13]
    assert [len(y) for _, y in batches_of(context, 1, 13)] == [1]
    assert [len(y) for _, y in batches_of(context, 3, 1)] == [1, 1, 1]


def test_a_method_that_needs_images_says_so() -> None:
    held = MaskKeeper([Snip(0.5)], inherit=False, context_seed=0, example=torch.zeros(2, 1, 8, 8), threat=THREAT)
    with pytest.raises(ModelError, match="needs training images"):
        held.compress(network())


def test_batches_are_training_images_in_zero_to_one() -> None:
    train = split_of(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([4, 5, 6]))
    found = CompressContext(torch.zeros(2, 1, 2, 2), torch.Generator().manual_seed(0), THREAT, train)
    x, y = found.batch(100)
    assert x.shape == (3, 1, 2, 2)
    assert bool((x == 1).all())
    assert sorted(y.tolist()) == [4, 5, 6]


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "2:8"])
def test_n_of_m_keeps_the_largest_of_each_run(pattern: str) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    torch.manual_seed(0)
    score = torch.rand(3, 16, 3, 3)
    mask = n_m_mask(score, n, m)
    for out, row, column, run in torch.cartesian_prod(*[torch.arange(size) for size in (3, 3, 3, 16 // m)]).tolist():
        values = score[out, run * m : (run + 1) * m, row, column]
        kept = mask[out, run * m : (run + 1) * m, row, column].bool()
        assert int(kept.sum()) == n
        assert float(values[kept].min()) > float(values[~kept].max())


def test_n_of_m_names_what_stays_dense() -> None:
    model = network()
    held = keeper(NM())
    held.finish(held.compress(model))
    assert held.notes == ["n_m: groups.0.conv1 stay dense: their inputs are no multiple of 4"]
    assert bool(model.groups[0].conv1.weight.all())  # type: ignore[union-attr,operator]
    assert float((model.head.weight == 0).float().mean()) == 0.5
    with pytest.raises(ModelError, match="more than 2 of 4"):
        NM().check(network(), CompressContext(torch.zeros(2, 1, 8, 8), torch.Generator(), THREAT))


@pytest.mark.slow
def test_criteria_from_a_recipe(tmp_path: Path) -> None:
    from robustkit.api import run

    names = ("lamp", "snip", "grasp", "synflow", "taylor")
    variants = "".join(f"  {name}: {{from: baseline, compress: [{name}: {{sparsity: 80%}}]}}\n" for name in names)
    text = (
        "name: criteria\ndata: {digits: {limit: 200}}\nmodel: {small_cnn: {widths: [8, 16]}}\n"
        "train: {epochs: 1, batch_size: 64}\nvariants:\n  baseline:\n"
        f"{variants}  n-m: {{from: baseline, compress: [n_m]}}\n"
        "evaluate: {examples: 20, attacks: [noise], latency: false}\n"
    )
    rows = {row.name: row for row in run(text, runs=tmp_path).variants}
    assert all(rows[name].sparsity == pytest.approx(0.8, abs=1e-3) for name in names)
    assert rows["n-m"].sparsity == pytest.approx(0.5, abs=0.02)
