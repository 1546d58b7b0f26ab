"""Single steps, replays, MART, perturbed weights, aligned gradients, curricula, ensembles: against what is by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.attacks.threat import Threat
from robustkit.data.split import Split
from robustkit.defenses.adversarial import NFgsm, PgdTraining, Trades, trades_loss
from robustkit.defenses.alignment import GradAlign, cosine, misalignment
from robustkit.defenses.awp import Awp, weight_perturbation
from robustkit.defenses.curriculum import Curriculum, grown
from robustkit.defenses.ensemble import EnsembleTraining, ensemble_loss
from robustkit.defenses.free import FreeTraining, free_update
from robustkit.defenses.inner import random_start
from robustkit.defenses.mart import Mart, log_other, mart_loss
from robustkit.defenses.single_step import Fgsm, FgsmRs, fgsm_examples, fgsm_rs_examples
from robustkit.train.hooks import Batch, DataContext, Defense, EpochReport, Forward, Step
from robustkit.train.step import train_step

SHAPE = (1, 4, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A linear model of two classes and the direction (16,) in which class 1 grows over class 0."""
    torch.manual_seed(seed)
    layer = nn.Linear(16, 2)
    return nn.Sequential(nn.Flatten(), layer), (layer.weight[1] - layer.weight[0]).detach()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)
    )


def images(count: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed)) * 0.3 + 0.35


def batch_of(classes: int = 3, count: int = 12) -> Batch:
    return Batch(images(count), torch.arange(count) % classes, torch.arange(count), classes)


def step_of(model: nn.Module, eps: float = 0.1, norm: str = "linf", progress: float = 0.5) -> Step:
    return Step(model, 0, 1, progress, Threat(norm, eps), generator(3))  # type: ignore[arg-type]


def away(direction: Tensor, y: Tensor) -> Tensor:
    """The direction (N, 16) in which a linear model's loss grows."""
    return direction * torch.where(y == 1, -1.0, 1.0)[:, None]


def test_fgsm_is_its_closed_form_on_a_linear_model() -> None:
    model, direction = linear()
    x, y = images(), torch.arange(12) % 2
    up = away(direction, y)
    found = fgsm_examples(model, x, y, Threat("linf", 0.1), alpha=0.1)
    torch.testing.assert_close(found, x + 0.1 * up.sign().view_as(x))
    found = fgsm_examples(model, x, y, Threat("l2", 0.2), alpha=0.2)
    torch.testing.assert_close(found, x + 0.2 * (up / up.norm(dim=1, keepdim=True)).view_as(x))
    batch = Batch(x, y, y, 2)
    assert (Fgsm().perturb(batch, step_of(model)) - x).abs().min() == pytest.approx(0.1, abs=1e-6)
    assert (Fgsm(alpha=0.03).perturb(batch, step_of(model)) - x).abs().max() == pytest.approx(0.03, abs=1e-6)


def test_fgsm_rs_is_its_closed_form_on_a_linear_model() -> None:
    model, direction = linear()
    x, y = images(), torch.arange(12) % 2
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator(5)) * 0.1
    by_hand = x + (noise + 0.125 * away(direction, y).sign().view_as(x)).clamp(-0.1, 0.1)
    found = fgsm_rs_examples(model, x, y, Threat("linf", 0.1), alpha=0.125, generator=generator(5))
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(
        FgsmRs().perturb(Batch(x, y, y, 2), replace(step_of(model), generator=generator(5))), by_hand
    )


def test_warmup_and_curriculum_shorten_a_given_alpha_as_well() -> None:
    model, _ = linear()
    batch = batch_of(2)
    for defense in (Fgsm(alpha=0.1, warmup=0.4), NFgsm(noise=0.0, alpha=0.1, warmup=0.4)):
        early = defense.perturb(batch, step_of(model, progress=0.1))
        assert (early - batch.x).abs().max() == pytest.approx(0.025, abs=1e-6)
        halved = replace(step_of(model, eps=0.05), ramp=0.5)
        assert (defense.perturb(batch, halved) - batch.x).abs().max() == pytest.approx(0.05, abs=1e-6)
        assert not defense.ready(step_of(model, progress=0.1))
        assert defense.ready(step_of(model, progress=0.4))


def test_free_training_is_the_algorithm_written_out() -> None:
    """Three weights and perturbations updated in turn by the gradients of one backward each, over two batches."""
    model, eps, rate, replay = network().train(), 0.1, 0.2, 3
    by_hand = copy.deepcopy(model)
    defense = FreeTraining(replay=replay)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batches = [batch_of(), Batch(images(8, seed=2), torch.arange(8) % 3, torch.arange(8), 3)]
    for batch in batches:
        train_step(model, batch, [(defense, step_of(model, eps))], optimizer, precision=None)
    delta = torch.zeros(12, *SHAPE)
    for batch in batches:
        for _ in range(replay):
            x = (batch.x + delta[: len(batch.x)]).clamp(0, 1).requires_grad_(True)
            by_hand.zero_grad()
            F.cross_entropy(by_hand(x), batch.y).backward()
            assert x.grad is not None
            with torch.no_grad():
                delta[: len(x)] = (delta[: len(x)] + eps * x.grad.sign()).clamp(-eps, eps)
                for parameter in by_hand.parameters():
                    assert parameter.grad is not None
                    parameter -= rate * parameter.grad
    for one, other in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(defense.state_dict()["delta"], delta)


def test_free_training_under_l2_follows_the_normed_gradient() -> None:
    delta, gradient = torch.zeros(2, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]], [[[3e-9, 4e-9]]]])
    moved = free_update(delta, gradient, Threat("l2", 0.5))
    torch.testing.assert_close(moved, torch.tensor([[[[0.3, 0.4]]], [[[0.3, 0.4]]]]))


def test_mart_loss_is_the_formula() -> None:
    clean, adversarial, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    p, q, rows = clean.softmax(1), adversarial.softmax(1), torch.arange(5)
    rival = torch.stack([q[i][torch.arange(4) != y[i]].max() for i in range(5)])
    boosted = -q[rows, y].log() - (1 - rival).log()
    by_hand = boosted + 5.0 * (p * (p / q).log()).sum(1) * (1 - p[rows, y])
    torch.testing.assert_close(mart_loss(clean, adversarial, y, y, 5.0), by_hand)
    soft = F.one_hot(y, 4) * 0.9 + 0.1 / 4
    smooth = by_hand + q[rows, y].log() - (soft * q.log()).sum(1)
    torch.testing.assert_close(mart_loss(clean, adversarial, y, soft, 5.0), smooth)
    batch = Batch(images(5), y, rows, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    batch.x_adv = images(5, seed=9)
    loss = Mart(beta=2.0).objective(batch, Forward(model, batch), step_of(model))
    torch.testing.assert_close(loss, mart_loss(model(batch.x), model(batch.x_adv), y, y, 2.0))


def test_mart_loss_of_a_sure_mistake_is_finite_and_has_a_gradient() -> None:
    logits = torch.tensor([[0.0, 90.0, -5.0]], requires_grad=True)
    found = log_other(logits, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([-90.0]), atol=1e-2, rtol=0)
    mart_loss(logits, logits, torch.tensor([0]), torch.tensor([0]), 5.0).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] > 1, "both terms push the sure mistake down"


def test_weight_perturbation_is_relative_to_each_layer_and_leaves_zeros() -> None:
    weights = [torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[0.1]]), torch.tensor([[2.0]])]
    gradients = [torch.tensor([[0.6, 5.0, 0.8]]), torch.tensor([[-7.0]]), torch.tensor([[0.0]])]
    moves = weight_perturbation(weights, gradients, 0.1)
    torch.testing.assert_close(moves[0], torch.tensor([[0.3, 0.0, 0.4]]))
    torch.testing.assert_close(moves[1], torch.tensor([[-0.01]]))
    torch.testing.assert_close(moves[2], torch.tensor([[0.0]]))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), gamma=st.floats(1e-4, 1), scale=st.floats(1e-20, 1e10))
def test_a_move_is_gamma_times_as_long_as_its_layer(seed: int, gamma: float, scale: float) -> None:
    weight = torch.randn(3, 5, generator=generator(seed))
    gradient = scale * torch.randn(3, 5, generator=generator(seed + 1))
    (move,) = weight_perturbation([weight], [gradient], gamma)
    torch.testing.assert_close(move.norm(), gamma * weight.norm(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        F.cosine_similarity(move.flatten(), gradient.flatten() / scale, dim=0), torch.tensor(1.0)
    )


class Counts(Defense):
    """Counts how often it attacks; in between it notes the weights that it meets."""

    def __init__(self) -> None:
        self.calls = 0

    def perturb(self, batch: Batch, step: Step) -> Tensor | None:
        self.calls += 1
        return (batch.x + 0.05).clamp(0, 1)


Loss = Callable[[nn.Module, Batch, Tensor], Tensor]


@pytest.mark.parametrize(
    ("partner", "loss"),
    [
        (Counts(), lambda model, batch, x_adv: F.cross_entropy(model(x_adv), batch.y)),
        (Trades(steps=1), lambda model, batch, x_adv: trades_loss(model(batch.x), model(x_adv), batch.y, 6.0).mean()),
        (Mart(steps=1), lambda m, batch, x_adv: mart_loss(m(batch.x), m(x_adv), batch.y, batch.y, 5.0).mean()),
    ],
    ids=["cross-entropy", "trades", "mart"],
)
def test_awp_takes_the_gradient_at_the_moved_weights_and_puts_them_back(partner: Defense, loss: Loss) -> None:
    model = network().train()
    by_hand, reference, awp = copy.deepcopy(model), copy.deepcopy(model), Awp(gamma=0.05)
    x_adv = partner.perturb(batch_of(), step_of(reference))
    assert x_adv is not None
    weights = [by_hand[0].weight, by_hand[4].weight]  # type: ignore[index]
    gradients = torch.autograd.grad(loss(by_hand, batch_of(), x_adv), weights)
    statistics = copy.deepcopy(model[1].state_dict())  # type: ignore[index]
    by_hand[1].load_state_dict(statistics)  # type: ignore[index]
    with torch.no_grad():
        for weight, move in zip(weights, weight_perturbation(weights, gradients, 0.05), strict=True):
            weight.add_(move)
    by_hand.zero_grad()
    loss(by_hand, batch_of(), x_adv).backward()
    # A rate of 0: what the step leaves of the weights is what was put back.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooked = [(partner, step_of(model)), (awp, step_of(model))]
    train_step(model, batch_of(), hooked, optimizer, precision=None)
    for (name, one), (_, other) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
        assert torch.equal(one, dict(reference.named_parameters())[name]), "bit for bit"
    torch.testing.assert_close(model[1].running_mean, by_hand[1].running_mean)  # type: ignore[index,union-attr]
    assert int(model[1].num_batches_tracked) == int(by_hand[1].num_batches_tracked)  # type: ignore[index,arg-type,union-attr]


def test_awp_does_not_attack_again_and_waits_for_its_start() -> None:
    model, counts = network().train(), Counts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked = [(counts, step_of(model)), (Awp(), step_of(model))]
    train_step(model, batch_of(), hooked, optimizer, precision=None)
    assert counts.calls == 1
    early, plain = copy.deepcopy(model), copy.deepcopy(model)
    for one, defenses in ((early, [Counts(), Awp(start=0.9)]), (plain, [Counts()])):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        train_step(one, batch_of(), [(each, step_of(one)) for each in defenses], optimizer, precision=None)
    assert all(torch.equal(a, b) for a, b in zip(early.parameters(), plain.parameters(), strict=True))


def test_awp_puts_the_weights_back_when_a_step_fails() -> None:
    class Fails(Defense):
        def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
            raise RuntimeError("broken")

    model = network()
    before = copy.deepcopy(model.state_dict())
    hooked = [(Awp(), step_of(model)), (Fails(), step_of(model))]
    with pytest.raises(RuntimeError, match="broken"):
        train_step(model, batch_of(), hooked, torch.optim.SGD(model.parameters(), lr=0.1), precision=None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "weight" in name)


def test_misalignment_of_a_linear_model_is_zero() -> None:
    model, _ = linear()
    found = misalignment(model, images(), torch.arange(12) % 2, Threat("linf", 0.3), generator())
    torch.testing.assert_close(found, torch.zeros(12), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.4), ("l2", 4.0)])
def test_misalignment_is_one_minus_the_cosine_of_the_gradients(norm: str, eps: float) -> None:
    model, x, y, threat = network().eval(), images(), torch.arange(12) % 3, Threat(norm, eps)  # type: ignore[arg-type]

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        return found.flatten(1)

    here, there = gradient(x), gradient(random_start(x, threat, generator(4)))
    by_hand = 1 - (here * there).sum(1) / here.norm(dim=1) / there.norm(dim=1)
    found = misalignment(model, x, y, threat, generator(4))
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-4)
    assert float(found.detach().max()) > 1e-3, "nothing was misaligned"
    penalty = GradAlign(amount=3.0).penalty(
        Batch(x, y, y, 3), Forward(model, batch_of()), replace(step_of(model, eps, norm), generator=generator(4))
    )
    torch.testing.assert_close(penalty, 3 * by_hand.mean(), atol=1e-4, rtol=1e-4)
    penalty.backward()
    weight = model[0].weight  # type: ignore[index]
    assert bool(weight.grad.abs().sum() > 0)  # type: ignore[union-attr]


def test_descending_the_misalignment_aligns_the_gradients() -> None:
    model, threat = network(), Threat("linf", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    y = torch.arange(12) % 3
    values = []
    for _ in range(20):
        value = misalignment(model, images(), y, threat, generator(4)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
    assert model.training


def test_what_another_penalty_does_to_batch_norms_is_not_in_the_misalignments_gradient() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    x, y = torch.rand(12, 1, 6, 6), torch.arange(12) % 3
    found = []
    for more in (False, True):
        model = copy.deepcopy(whole).train()
        misaligned = misalignment(model, x, y, Threat("linf", 0.3), generator(4)).mean()
        if more:
            model(5 * x)
        misaligned.backward()
        weight = model[0].weight
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        found.append(weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_cosine_of_tiny_gradients_and_of_none() -> None:
    first = torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    second = torch.tensor([[4e-30, 3e-30], [1.0, 0.0], [-2.0, 0.0]])
    found = cosine(first, second)
    torch.testing.assert_close(found, torch.tensor([24 / 25, 1.0, -1.0]))
    found.sum().backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert not first.grad[1].any()


def report(accuracy: float) -> EpochReport:
    return EpochReport(0, 1.0, accuracy, 0.5)


def test_a_curriculum_by_progress() -> None:
    assert [grown(share, 0.2, 0.5) for share in (0, 0.25, 0.5, 0.9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    one, model = Curriculum(over=0.5, begin=0.2), network()
    assert one.ramp(step_of(model, progress=0.25)) == pytest.approx(0.6)
    assert not one.ready(step_of(model, progress=0.49))
    assert one.ready(step_of(model, progress=0.5))


def test_a_curriculum_by_accuracy_goes_up_where_the_accuracy_is_there() -> None:
    one, model = Curriculum(by="accuracy", over=0.8, levels=4, target=0.6), network()
    early = step_of(model, progress=0.1)
    seen = []
    for accuracy in (0.5, 0.7, 0.59, 0.6, 0.9, 0.9):
        seen.append(one.ramp(early))
        one.after_epoch(report(accuracy))
    assert seen == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.75, 1.0])
    assert one.ready(early)
    fresh = Curriculum(by="accuracy", over=0.8, levels=4)
    assert not fresh.ready(early)
    assert fresh.ramp(step_of(model, progress=0.8)) == 1, "in the end the full eps is trained at in any case"
    fresh.load_state_dict(one.state_dict())
    assert fresh.ramp(early) == 1


class Sees(Defense):
    """Notes how far the images of each step were moved."""

    def __init__(self) -> None:
        self.moved: list[float] = []

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        self.moved.append(0.0 if batch.x_adv is None else float((batch.x_adv.detach() - batch.x).abs().max()))
        return None


@pytest.mark.parametrize("defense", [PgdTraining(steps=3), Fgsm(alpha=0.1), FreeTraining(replay=1), Trades(steps=3)])
def test_a_curriculum_sets_the_eps_of_whatever_perturbs(defense: Defense) -> None:
    model, sees = network().train(), Sees()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    curriculum = Curriculum(over=0.5)
    for progress in (0.0, 0.25, 0.25, 0.75):
        step = step_of(model, progress=progress)
        # In front of the curriculum and after it: its place in the recipe has no effect.
        hooked: list[tuple[Defense, Step]] = [(defense, step), (curriculum, step), (sees, step)]
        train_step(model, batch_of(), hooked, optimizer, precision=None)
    assert sees.moved[0] == 0
    assert sees.moved[2:] == pytest.approx([0.05, 0.1 if not isinstance(defense, FreeTraining) else 0.05], abs=1e-5)


def test_a_batch_that_is_replayed_takes_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sees = network().train(), Sees()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooked: list[tuple[Defense, Step]] = [(FreeTraining(replay=4), step_of(model)), (sees, step_of(model))]
    train_step(model, batch_of(), hooked, optimizer, precision=None)
    assert sees.moved == pytest.approx([0.0, 0.1, 0.1, 0.1], abs=1e-6)


def trained_sources(digits: Split, context: Callable[..., DataContext], **given: Any) -> EnsembleTraining:
    defense = EnsembleTraining(**given)
    assert defense.prepare_data(digits, context()) is digits
    return defense


def test_an_ensemble_attacks_its_members_in_turn(digits: Split, context: Callable[..., DataContext], log: Any) -> None:
    defense = trained_sources(digits.select(torch.arange(600)), context, sources=2, epochs=8)
    again = trained_sources(digits.select(torch.arange(600)), context, sources=2, epochs=8)
    assert log.about("2 source models") == {"sources": 2}
    x, y = digits.floats(0, 40), digits.labels[:40]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    members = [model, *defense._models]
    assert all(not p.requires_grad and not m.training for m in members[1:] for p in m.parameters())
    assert all((member(x).argmax(1) == y).float().mean() > 0.8 for member in members[1:]), "they know the digits"
    assert all(
        torch.equal(a, b) for a, b in zip(members[1].parameters(), again._models[0].parameters(), strict=True)
    ), "the same seed makes the same sources"
    batch = Batch(x, y, y, 10)
    for turn in range(4):
        step = replace(step_of(model), generator=generator(turn))
        by_hand = fgsm_rs_examples(members[turn % 3], x, y, step.threat, alpha=0.1, generator=generator(turn))
        assert torch.equal(defense.perturb(batch, step), by_hand)
    assert defense.state_dict() == {"turn": 4}


def test_ensemble_loss_is_a_mix_of_both_cross_entropies() -> None:
    clean, adversarial, y = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    first, second = (-one.log_softmax(1)[torch.arange(5), y] for one in (clean, adversarial))
    torch.testing.assert_close(ensemble_loss(clean, adversarial, y, 0.25), 0.25 * first + 0.75 * second)
