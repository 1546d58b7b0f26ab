"""Averages of weights, lookahead and SAM, against closed forms; what is pruned stays zero in all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.defenses import averaging
from robustkit.defenses.averaging import Ema, Swa, averaged, recalibrate_, warmed_decay
from robustkit.defenses.constraints import GradientClipping, MaxNorm, SpectralNorm, insert_spectral_norm
from robustkit.defenses.lookahead import Lookahead
from robustkit.defenses.sharpness import Sam, ascent
from robustkit.train.hooks import Batch, Defense, Forward, Step
from robustkit.train.step import train_step


def line(value: float = 0.0) -> nn.Linear:
    layer = nn.Linear(1, 2, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


class Flat(nn.Module):
    """A linear model of images, whose weights a test sets."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.t()


def step_of(model: nn.Module, epoch: int = 0, epochs: int = 4) -> Step:
    return Step(model, epoch, epochs, epoch / epochs, Threat("linf", 0.1), torch.Generator().manual_seed(0))


def batch_of(count: int = 4) -> Batch:
    x = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(count) % 2, torch.arange(count), 2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.125, 4, width=32), min_size=1, max_size=8), st.floats(0.1, 0.99))
def test_ema_is_the_warmed_average_of_what_the_weights_were(values: list[float], decay: float) -> None:
    model, ema, expected = line(), Ema(decay), values[0]
    for number, value in enumerate(values):
        nn.init.constant_(model.weight, value)
        ema.after_step(step_of(model))
        keep = min(decay, (1 + number) / (10 + number))
        expected = keep * expected + (1 - keep) * value
    found = ema.evaluated_model(model)
    assert found is not model
    torch.testing.assert_close(found.get_parameter("weight"), torch.full((2, 1), expected))
    assert (model.weight == values[-1]).all(), "training goes on with its own weights"


def test_the_first_decay_is_a_tenth_and_grows_to_the_one_asked() -> None:
    assert warmed_decay(0.999, 0) == 0.1
    assert warmed_decay(0.9, 10_000) == 0.9


def test_swa_is_the_mean_over_ends_of_epochs_from_its_start() -> None:
    model, swa, batch = line(), Swa(start=0.5), batch_of()
    evaluated = []
    for epoch in range(4):
        step = step_of(model, epoch)
        for value in (100.0, epoch + 1.0):
            swa.transform_batch(batch, step)
            with swa.around_step(batch, Forward(model, batch), step):
                nn.init.constant_(model.weight, value)
            swa.after_step(step)
        # The model takes no images: nothing to recalibrate.
        evaluated.append(float(swa.evaluated_model(model).get_parameter("weight")[0, 0].detach()))
        assert swa.ready(Step(model, epoch, 4, (epoch + 1) / 4, step.threat, step.generator)) == (epoch >= 2)
    assert evaluated == [1.0, 2.0, 3.0, 3.5]


@pytest.mark.parametrize("average", [Ema(0.9), Swa(start=0.1)], ids=["ema", "swa"])
def test_statistics_are_taken_on_what_the_network_saw(average: Ema | Swa) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1)).train()
    for epoch in (0, 1):
        batch = batch_of()
        batch.x_adv = batch.x + 3 * (epoch + 1)
        step = step_of(model, epoch, 2)
        average.transform_batch(batch, step)
        with average.around_step(batch, Forward(model, batch), step):
            pass
        average.after_step(step)
    mean = average.evaluated_model(model).get_buffer("0.running_mean")
    # Those of the last epoch alone, and adversarial.
    torch.testing.assert_close(mean, batch_of().x.mean((0, 2, 3)) + 6)
    assert model.get_buffer("0.running_mean") == 0


def test_ema_of_statistics_where_no_batch_is_kept() -> None:
    model, ema = nn.Sequential(nn.BatchNorm2d(1)).train(), Ema(0.5, batches=0)
    for value in (0.0, 8.0):
        model.get_buffer("0.running_mean").fill_(value)
        with ema.around_step(batch_of(), Forward(model, batch_of()), step_of(model)):
            pass
        ema.after_step(step_of(model))
    # The second update keeps 2 / 11 of the average.
    torch.testing.assert_close(ema.evaluated_model(model).get_buffer("0.running_mean"), torch.tensor([8 * 9 / 11]))


def test_a_short_training_ends_with_an_average_of_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap is provoked: without the warm-up a short training's average is mostly its random first weights."""

    def accuracy() -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        ema, optimizer = Ema(0.999), torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            train_step(model, Batch(x, y, y, 10), [(ema, step_of(model))], optimizer, precision=None)
        return float((ema.evaluated_model(model).eval()(x).argmax(1) == y).float().mean())

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.as_tensor(labels)
    assert accuracy() > 0.9
    monkeypatch.setattr(averaging, "warmed_decay", lambda decay, updates: decay)
    assert accuracy() < 0.5


def test_recalibrated_statistics_are_those_of_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    batches = list(torch.rand(5, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    recalibrate_(model, batches)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    everything = torch.cat(batches)
    torch.testing.assert_close(norm.running_mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())


def test_lookahead_moves_slow_weights_every_k_steps() -> None:
    model, ahead, batch = line(0.0), Lookahead(k=2, alpha=0.25), batch_of()
    seen = []
    for _ in range(4):
        ahead.transform_batch(batch, step_of(model))
        with torch.no_grad():
            model.weight.add_(1)
        ahead.after_step(step_of(model))
        seen.append(float(model.weight[0, 0].detach()))
    # 0 -> 1 -> 2, a quarter of it; 0.5 -> 1.5 -> 2.5, a quarter of the way from 0.5.
    assert seen == [1.0, 0.5, 1.5, 1.0]


def test_sam_steps_by_the_gradient_at_the_worst_weights_nearby() -> None:
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    batch, rho, lr = batch_of(), 0.5, 0.1

    def gradient(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(batch.x.flatten(1) @ leaf.t(), batch.y)
        return torch.autograd.grad(loss, leaf)[0]

    first = gradient(weight)
    expected = weight - lr * gradient(weight + rho * first / first.norm())
    model = Flat(weight)
    train_step(model, batch, [(Sam(rho), step_of(model))], torch.optim.SGD(model.parameters(), lr=lr), precision=None)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_the_ascent_is_rho_long_and_leaves_pruned_weights_alone() -> None:
    weight, bias = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2)
    moves = ascent([weight, bias], [torch.full((2, 2), 3.0), torch.full((2,), 4.0)], 0.5)
    assert (moves[0][weight == 0] == 0).all()
    assert (moves[1] != 0).all(), "a bias of zero is a bias, not pruned"
    torch.testing.assert_close(torch.cat([move.flatten() for move in moves]).norm(), torch.tensor(0.5))


def test_sam_updates_running_statistics_once() -> None:
    def trained(defenses: list[Defense]) -> nn.BatchNorm2d:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)).train()
        hooked = [(defense, step_of(model)) for defense in defenses]
        train_step(model, batch_of(), hooked, torch.optim.SGD(model.parameters(), lr=0.1), precision=None)
        norm = model[0]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    plain, sam = trained([]), trained([Sam()])
    assert plain.running_mean is not None
    assert sam.running_mean is not None
    assert torch.equal(plain.running_mean, sam.running_mean)
    assert plain.num_batches_tracked == sam.num_batches_tracked
    assert sam.track_running_stats


AVERAGES: dict[str, Callable[[], Defense]] = {
    "ema": lambda: Ema(0.5),
    "swa": lambda: Swa(0.1),
    "lookahead": lambda: Lookahead(k=1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_a_weight_that_is_pruned_on_the_way_is_zero_in_the_average(name: str) -> None:
    defense, model, batch = AVERAGES[name](), line(3.0), batch_of()
    for epoch in range(3):
        step = step_of(model, epoch)
        defense.transform_batch(batch, step)
        with defense.around_step(batch, Forward(model, batch), step), torch.no_grad():
            model.weight.add_(1)
            if epoch > 0:
                model.weight[0] = 0
        defense.after_step(step)
    found = defense.evaluated_model(model).get_parameter("weight").detach()
    assert found[0] == 0
    assert found[1] != 0


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averaged_weights_have_the_spectral_norm_that_was_asked(name: str) -> None:
    """Also where the largest direction has turned on the way: the mean of singular vectors belongs to no matrix."""
    defense, batch = AVERAGES[name](), batch_of()
    model = insert_spectral_norm(nn.Linear(2, 2, bias=False), 1).train()
    for epoch in range(4):
        step = step_of(model, epoch)
        defense.transform_batch(batch, step)
        with defense.around_step(batch, Forward(model, batch), step), torch.no_grad():
            angle = torch.tensor(0.6 * epoch)
            turned = torch.stack([angle.cos(), angle.sin()])
            model.get_parameter("parametrizations.weight.original").copy_(turned.outer(turned.flip(0)))
            for _ in range(30):
                model(torch.ones(1, 2))
        defense.after_step(step)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    found = SpectralNorm().restore_model(defense.evaluated_model(model))
    norm = torch.linalg.matrix_norm(found.get_parameter("weight").detach(), ord=2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-3, atol=0)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_averaged_names_parameters_and_float_buffers_alone() -> None:
    names = set(averaged(nn.Sequential(nn.BatchNorm2d(1))))
    assert names == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 5))
def test_max_norm_bounds_each_unit_and_leaves_smaller_ones(limit: float) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        model.weight.mul_(torch.linspace(0.1, 10, 5).view(-1, 1, 1, 1))
    before = model.weight.detach().clone()
    MaxNorm(limit).after_step(step_of(model))
    old, new = before.flatten(1).norm(dim=1), model.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(new, old.clamp(max=limit), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.weight.detach() / new.view(-1, 1, 1, 1), before / old.view(-1, 1, 1, 1))


def test_clipping_bounds_the_step() -> None:
    for defense, expected in (
        (GradientClipping(0.5), torch.tensor([[0.3], [0.4]])),
        (GradientClipping(3.5, by="value"), torch.tensor([[3.0], [3.5]])),
        (GradientClipping(9.0), torch.tensor([[3.0], [4.0]])),
    ):
        model = line()
        model.weight.grad = torch.tensor([[3.0], [4.0]])
        defense.after_backward(step_of(model))
        torch.testing.assert_close(model.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_clipping_happens_between_backward_and_step() -> None:
    model = Flat(torch.zeros(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train_step(model, batch_of(), [(GradientClipping(1e-3), step_of(model))], optimizer, precision=None)
    torch.testing.assert_close(model.weight.detach().norm(), torch.tensor(1e-3), rtol=1e-2, atol=0)
