"""Inner maximisations and TRADES against closed forms; balls and boxes for any input."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit import registry
from robustkit.attacks.projection import l2_norm, project_
from robustkit.attacks.threat import Threat
from robustkit.defenses.adversarial import NFgsm, PgdTraining, Trades, trades_loss
from robustkit.defenses.budget import warmed
from robustkit.defenses.inner import (
    kl_divergence,
    margin_score,
    n_fgsm_examples,
    near_start,
    pgd_examples,
    random_start,
    trades_examples,
)
from robustkit.errors import UsageError
from robustkit.recipe.norms import DEFENSE_NORMS
from robustkit.train.hooks import Batch, Forward, Step

SHAPE = (1, 4, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_binary(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A linear model of two classes and the direction (16,) in which class 1 grows over class 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        layer = model[1]
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(torch.randn(2, 16, generator=generator(seed)))
        layer.bias.zero_()
    return model, (layer.weight[1] - layer.weight[0]).detach()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )


def images(count: int = 12, low: float = 0.35, high: float = 0.65, seed: int = 1) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed)) * (high - low) + low


def make_step(model: nn.Module, threat: Threat, progress: float = 0.5, seed: int = 3) -> Step:
    return Step(model, 0, 1, progress, threat, generator(seed))


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: str, start: bool, loss: str) -> None:
    model, direction = linear_binary()
    x, y = images(), torch.arange(12) % 2
    threat = Threat(norm, 0.1 if norm == "linf" else 0.3)  # type: ignore[arg-type]
    found = pgd_examples(
        model,
        x,
        y,
        threat,
        steps=60,
        alpha=0.05,
        generator=generator(),
        start=start,
        loss=loss,  # type: ignore[arg-type]
    )
    away = direction * torch.where(y == 1, -1.0, 1.0)[:, None]
    best = 0.1 * away.sign() if norm == "linf" else 0.3 * away / away.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, x + best.view_as(x), atol=2e-3 if norm == "l2" else 1e-6, rtol=0)


def test_l2_pgd_reaches_the_bound_of_examples_that_the_model_is_sure_of() -> None:
    model, direction = linear_binary()
    x = images()
    with torch.no_grad():
        model[-1].weight.mul_(140 / direction.norm())  # type: ignore[operator,index,union-attr]
    logits = model(x).detach()
    y = logits.argmax(1)
    assert float((logits[:, 0] - logits[:, 1]).abs().min()) > 35, "or the gradient is not small"
    found = pgd_examples(model, x, y, Threat("l2", 0.05), steps=10, alpha=0.02, generator=generator(), start=False)
    moved = (found - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), atol=1e-4, rtol=0)


def test_pgd_keeps_the_worst_of_its_restarts() -> None:
    model, x, y = small_model().eval(), images(), torch.arange(12) % 3
    threat = Threat("linf", 0.2)
    shared = generator(7)
    single = [pgd_examples(model, x, y, threat, steps=1, alpha=0.02, generator=shared) for _ in range(4)]
    several = pgd_examples(model, x, y, threat, steps=1, alpha=0.02, generator=generator(7), restarts=4)
    losses = torch.stack([F.cross_entropy(model(found), y, reduction="none") for found in single])
    torch.testing.assert_close(F.cross_entropy(model(several), y, reduction="none"), losses.amax(0))
    assert (losses.argmax(0) > 0).any(), "the first restart won everywhere: nothing was tested"


def test_margin_score_is_the_best_wrong_logit_minus_the_right_one() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 1.0, 4.0]])
    torch.testing.assert_close(margin_score(torch.tensor([0, 1]))(logits), torch.tensor([-0.5, 3.0]))


def test_n_fgsm_equals_its_closed_form_on_a_linear_model() -> None:
    model, direction = linear_binary()
    x, y = images(), torch.arange(12) % 2
    found = n_fgsm_examples(model, x, y, 0.05, alpha=0.05, noise=2.0, generator=generator(5))
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator(5)) * 0.1
    away = (direction * torch.where(y == 1, -1.0, 1.0)[:, None]).sign().view_as(x)
    torch.testing.assert_close(found, x + noise + 0.05 * away, atol=1e-7, rtol=0)
    assert (found - x).abs().max() > 0.1, "the perturbation was clipped to less than noise * eps"


def test_trades_inner_step_finds_the_direction_of_the_kl_on_a_linear_model() -> None:
    model, direction = linear_binary()
    x = images()
    found = trades_examples(model, x, Threat("linf", 0.1), steps=30, alpha=0.02, generator=generator())
    # KL grows along the direction of the logit difference, on whichever side of x the start lay.
    side = ((found - x).flatten(1) @ direction).sign()
    torch.testing.assert_close(found - x, (0.1 * side[:, None] * direction.sign()).view_as(x), atol=1e-6, rtol=0)


def test_trades_loss_is_the_formula() -> None:
    clean, adversarial, y = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    p, q = clean.softmax(1), adversarial.softmax(1)
    by_hand = -p[torch.arange(5), y].log() + 6.0 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(trades_loss(clean, adversarial, y, 6.0), by_hand)
    soft = F.one_hot(y, 3).float() * 0.9 + 0.1 / 3
    smooth = -(soft * p.log()).sum(1) + 6.0 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(trades_loss(clean, adversarial, soft, 6.0), smooth)


def test_trades_pulls_the_clean_prediction_too() -> None:
    """Zhang et al. take the gradient of both sides of the KL."""
    clean, adversarial = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1])
    trades_loss(clean, adversarial, y, 6.0).sum().backward()
    p, q = clean.detach().clone().requires_grad_(True), adversarial.detach().clone().requires_grad_(True)
    by_hand = F.cross_entropy(p, y, reduction="sum") + 6.0 * F.kl_div(
        q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="sum"
    )
    by_hand.backward()
    torch.testing.assert_close(clean.grad, p.grad)
    torch.testing.assert_close(adversarial.grad, q.grad)


def test_kl_of_equal_logits_is_exactly_zero() -> None:
    logits = torch.randn(4, 3) * 20
    assert (kl_divergence(logits, logits.clone()) == 0).all()
    batch = Batch(images(4), torch.tensor([0, 1, 0, 1]), torch.arange(4), 2)
    batch.x_adv = batch.x.clone()
    model, _ = linear_binary()
    loss = Trades(beta=100.0).objective(batch, Forward(model, batch), make_step(model, Threat("linf", 0.1)))
    torch.testing.assert_close(loss, F.cross_entropy(model(batch.x), batch.y, reduction="none"), rtol=0, atol=0)


def test_trades_starts_off_the_clean_image_where_the_gradient_is_zero() -> None:
    model, _ = linear_binary()
    found = trades_examples(model, images(), Threat("linf", 0.1), steps=1, alpha=0.05, generator=generator())
    assert ((found - images()).abs().flatten(1).amax(1) > 0.04).all()


@pytest.mark.parametrize("defense", [PgdTraining(steps=3), NFgsm(), Trades(steps=3)])
def test_model_is_restored_and_parameters_get_no_gradient(defense: PgdTraining | NFgsm | Trades) -> None:
    model = small_model()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Batch(images(), torch.arange(12) % 3, torch.arange(12), 3)
    defense.perturb(batch, make_step(model, Threat("linf", 0.1)))
    assert model.training
    assert not model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_model_is_restored_when_its_forward_fails() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        pgd_examples(
            model, images(), torch.arange(12) % 3, Threat("linf", 0.1), steps=1, alpha=0.1, generator=generator()
        )
    assert model.training
    assert model.layer.weight.requires_grad


@pytest.mark.parametrize(
    ("defense", "norm", "use"),
    [
        (NFgsm(), "l2", "linf"),
        (NFgsm(), "l1", "linf"),
        (PgdTraining(), "l1", "linf or l2"),
        (Trades(), "l1", "linf or l2"),
    ],
)
def test_wrong_norm_is_a_usage_error(defense: PgdTraining | NFgsm | Trades, norm: str, use: str) -> None:
    batch = Batch(images(), torch.arange(12) % 2, torch.arange(12), 2)
    model, _ = linear_binary()
    with pytest.raises(UsageError, match=f"against {use}, and the threat is {norm}"):
        defense.perturb(batch, make_step(model, Threat(norm, 0.1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", sorted(set(DEFENSE_NORMS) - {"grad_align"}))
def test_a_recipe_is_told_the_norms_that_the_defense_has(name: str, norm: Literal["linf", "l2", "l1"]) -> None:
    defense = registry.create(registry.find("defense", name), {})
    batch = Batch(images(), torch.arange(12) % 2, torch.arange(12), 2)
    model, _ = linear_binary()
    defense.take_teacher(model)
    fits = norm in DEFENSE_NORMS[name]
    with nullcontext() if fits else pytest.raises(UsageError, match=f"^{name} trains against"):
        defense.perturb(batch, make_step(model, Threat(norm, 0.1)))


@pytest.mark.parametrize("defense", [NFgsm(alpha=2.0), PgdTraining(alpha=2.0), Trades(alpha=2.0)])
def test_alpha_in_255ths_is_a_usage_error(defense: PgdTraining | NFgsm | Trades) -> None:
    batch = Batch(images(), torch.arange(12) % 2, torch.arange(12), 2)
    model, _ = linear_binary()
    with pytest.raises(UsageError, match="2/255"):
        defense.perturb(batch, make_step(model, Threat("linf", 0.1)))


def test_restarts_without_random_start_are_refused() -> None:
    with pytest.raises(UsageError, match="random_start"):
        PgdTraining(restarts=2, random_start=False)


def test_warmup_grows_eps_and_withholds_checkpoints() -> None:
    model, _ = linear_binary()

    def eps_and_share(progress: float, warmup: float) -> tuple[float | Tensor, float]:
        threat, ramp = warmed(make_step(model, Threat("linf", 0.2), progress), warmup)
        return threat.eps, ramp

    assert eps_and_share(0.1, 0.4) == pytest.approx((0.05, 0.25))
    assert eps_and_share(0.5, 0.4) == (0.2, 1.0)
    assert eps_and_share(0.0, 0.0) == (0.2, 1.0)
    batch = Batch(images(), torch.arange(12) % 2, torch.arange(12), 2)
    for defense in (PgdTraining(warmup=0.4), NFgsm(warmup=0.4, noise=0.0), Trades(warmup=0.4)):
        early = make_step(model, Threat("linf", 0.2), progress=0.1)
        assert not defense.ready(early)
        assert defense.ready(make_step(model, Threat("linf", 0.2), progress=0.4))
        found = defense.perturb(batch, early)
        assert (found - batch.x).abs().max() == pytest.approx(0.05, abs=1e-5)
        zero = defense.perturb(batch, make_step(model, Threat("linf", 0.2), progress=0.0))
        assert torch.equal(zero, batch.x)


def test_soft_targets_reach_the_inner_maximisation() -> None:
    model, _ = linear_binary()
    x, y = images(), torch.zeros(12, dtype=torch.int64)
    other = F.one_hot(1 - y, 2).float()
    step = make_step(model, Threat("linf", 0.1))
    hard = PgdTraining(random_start=False).perturb(Batch(x, 1 - y, torch.arange(12), 2), step)
    soft = PgdTraining(random_start=False).perturb(Batch(x, y, torch.arange(12), 2, target=other), step)
    torch.testing.assert_close(hard, soft)


@settings(deadline=None, max_examples=40)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 1),
    seed=st.integers(0, 1000),
    corner=st.booleans(),
    steps=st.integers(1, 3),
)
def test_every_inner_maximisation_stays_in_ball_and_box(
    norm: str, eps: float, seed: int, corner: bool, steps: int
) -> None:
    x = torch.rand(5, *SHAPE, generator=generator(seed))
    x = x.round() if corner else x
    model, _ = linear_binary(seed)
    threat, y = Threat(norm, eps), torch.arange(5) % 2  # type: ignore[arg-type]
    alpha = eps * 0.7
    found = [
        random_start(x, threat, generator(seed)),
        pgd_examples(model, x, y, threat, steps=steps, alpha=alpha, generator=generator(seed)),
        trades_examples(model, x, threat, steps=steps, alpha=alpha, generator=generator(seed), spread=0.1),
    ]
    for adversarial in found:
        delta = (adversarial - x).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (size <= eps + 1e-6).all()
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
    if norm == "linf":
        noisy = n_fgsm_examples(model, x, y, eps, alpha=eps, noise=2.0, generator=generator(seed))
        assert (noisy - x).abs().max() <= 3 * eps + 1e-6
        assert noisy.min() >= 0
        assert noisy.max() <= 1


def test_l2_random_start_fills_the_ball_uniformly() -> None:
    x = torch.full((4000, 1, 2, 2), 0.5)
    radius = (random_start(x, Threat("l2", 0.2), generator()) - x).flatten(1).norm(dim=1)
    # In four dimensions the share of the volume within r is (r / eps) ** 4.
    assert ((radius / 0.2) ** 4).mean() == pytest.approx(0.5, abs=0.02)


def test_projection_keeps_what_is_inside_and_scales_what_is_outside() -> None:
    delta = torch.tensor([[[[0.3, 0.4]]], [[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    per_example = Threat("l2", torch.tensor([1.0, 1.0, 0.5]))
    torch.testing.assert_close(
        project_(delta.clone(), per_example), torch.tensor([[[[0.3, 0.4]]], [[[0.6, 0.8]]], [[[0.0, 0.0]]]])
    )
    torch.testing.assert_close(project_(delta.clone(), Threat("linf", 0.35)).amax(), torch.tensor(0.35))
    assert l2_norm(delta).flatten()[1].item() == pytest.approx(5.0)
    assert project_(delta.clone(), Threat("l1", 1.0)).abs().flatten(1).sum(1).tolist() == pytest.approx([0.7, 1.0, 0.0])


def test_default_alpha_can_cross_the_ball() -> None:
    model, _ = linear_binary()
    batch = Batch(images(), torch.arange(12) % 2, torch.arange(12), 2)
    found = PgdTraining(steps=4).perturb(batch, make_step(model, Threat("linf", 0.1)))
    assert math.isclose((found - batch.x).abs().min().item(), 0.1, abs_tol=1e-5)


def test_gaussian_draws_do_not_depend_on_the_layout() -> None:
    """In channels last torch draws other numbers, ten times as slowly."""
    x = torch.rand(6, 3, 8, 8)
    found = []
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        generator = torch.Generator().manual_seed(0)
        near = near_start(images, Threat("linf", 0.1), generator, 0.01)
        found.append((near, random_start(images, Threat("l2", 0.1), generator)))
    for usual, laid_out in zip(*found, strict=True):
        torch.testing.assert_close(laid_out, usual, rtol=0, atol=1e-6)
        assert laid_out.is_contiguous(memory_format=torch.channels_last)
