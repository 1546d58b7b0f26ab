"""Penalties against closed forms on linear models; spectral norm in while training and gone afterwards."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.compress.keeper import MaskKeeper
from robustkit.compress.masks import Masks
from robustkit.defenses.constraints import GradientClipping, SpectralNorm, insert_spectral_norm
from robustkit.defenses.logits import LogitPairing
from robustkit.defenses.regularization import elastic_penalty, orthogonal_penalty
from robustkit.defenses.smoothness import InputGradient, first_order_gain, input_gradients, jacobian_penalty
from robustkit.errors import ModelError, UsageError
from robustkit.train.hooks import Batch, Forward, Step


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def weight_of(model: nn.Sequential) -> Tensor:
    return model.get_parameter("1.weight").detach()


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=seeded(3))


def test_elastic_by_hand() -> None:
    found = elastic_penalty([torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])], 0.5, 0.1)
    torch.testing.assert_close(found, torch.tensor(0.5 * 6 + 0.1 * 14))


def test_orthonormal_weights_cost_nothing_whichever_way_they_lie() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=seeded()))[0]
    for weight in (basis, basis[:3], basis[:, :3], basis[:2].view(2, 6, 1, 1)):
        assert orthogonal_penalty([weight]) < 1e-10
    torch.testing.assert_close(orthogonal_penalty([2 * basis[:3]]), torch.tensor(27.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert orthogonal_penalty([basis]) < 1e-10


def test_projections_estimate_the_jacobian_of_a_linear_model() -> None:
    model = linear()
    found = jacobian_penalty(model, images(), 4000, seeded())
    torch.testing.assert_close(found.detach(), weight_of(model).square().sum(), rtol=0.05, atol=0)


def test_the_jacobian_penalty_has_a_gradient_to_the_weights() -> None:
    model = linear()
    jacobian_penalty(model, images(), 1, seeded()).backward()  # type: ignore[no-untyped-call]
    gradient = model.get_parameter("1.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_input_gradients_of_a_linear_model() -> None:
    model, x, y = linear(), images(), torch.tensor([0, 1, 2, 0, 1])
    gap = model(x).softmax(1) - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(input_gradients(model, x, y), gap @ weight_of(model))
    soft = nn.functional.one_hot(y, 3).float()
    torch.testing.assert_close(input_gradients(model, x, soft), input_gradients(model, x, y))


@pytest.mark.parametrize(("norm", "expected"), [("linf", 0.7), ("l2", 0.5), ("l1", 0.4)])
def test_the_gain_is_eps_times_the_dual_norm(norm: str, expected: float) -> None:
    gain = first_order_gain(torch.tensor([[0.3, -0.4]]), Threat(norm, 1.0))  # type: ignore[arg-type]
    torch.testing.assert_close(gain, torch.tensor([expected]))


def test_no_dual_norm_under_l0() -> None:
    with pytest.raises(UsageError, match="l0"):
        first_order_gain(torch.ones(1, 2), Threat("l0", 1.0))


def test_the_dual_form_is_what_a_small_step_gains() -> None:
    model, x, y = linear(), images(), torch.tensor([0, 1, 2, 0, 1])
    eps = 1e-3
    step = Step(model, 0, 1, 0.5, Threat("linf", eps), seeded())
    batch = Batch(x, y, y, 3)
    penalty = InputGradient().penalty(batch, Forward(model, batch), step)
    moved = x + eps * input_gradients(model, x, y).sign().view_as(x)
    gain = nn.functional.cross_entropy(model(moved), y) - nn.functional.cross_entropy(model(x), y)
    torch.testing.assert_close(penalty, gain, rtol=1e-2, atol=0)


def test_logit_pairing_pairs_where_there_is_a_pair() -> None:
    model, x, y = nn.Flatten(), images(2), torch.tensor([0, 1])
    batch = Batch(x, y, y, 4)
    step = Step(model, 0, 1, 0.5, Threat("linf", 0.1), seeded())
    torch.testing.assert_close(LogitPairing(2.0).penalty(batch, Forward(model, batch), step), 2 * x.square().mean())
    # While eps is still 0 there is no pair, and no squeezing in its place.
    assert LogitPairing(2.0).penalty(batch, Forward(model, batch), replace(step, ramp=0.0)) is None
    batch.x_adv = x + 0.5
    torch.testing.assert_close(LogitPairing(2.0).penalty(batch, Forward(model, batch), step), torch.tensor(0.5))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 6), nn.Linear(6, 3)
    )


def test_spectral_norm_is_one_and_the_stored_model_is_plain() -> None:
    plain = network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = SpectralNorm(iterations=3).prepare_model(plain).train()
    x = torch.rand(2, 1, 8, 8, generator=seeded())
    for _ in range(10):
        model(x)
    expected = model.eval()(x)
    copied = copy.deepcopy(model)
    for one in (copied, model):
        restored = SpectralNorm().restore_model(one)
        assert list(restored.state_dict()) == list(before)
        assert [type(module) for module in restored.modules()] == [type(module) for module in network().modules()]
        torch.testing.assert_close(restored(x), expected)
    for name, weight in model.state_dict().items():
        if weight.dim() > 1:
            largest = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
            torch.testing.assert_close(largest, torch.tensor(1.0), rtol=1e-2, atol=0)
            torch.testing.assert_close(
                weight * torch.linalg.matrix_norm(before[name].flatten(1), ord=2), before[name], rtol=1e-2, atol=1e-3
            )


def test_spectral_norm_does_not_touch_the_global_generator_and_starts_alike() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = insert_spectral_norm(network(), 1).state_dict()
    torch.manual_seed(6)
    second = insert_spectral_norm(network(), 1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.set_rng_state(state)


def test_spectral_norm_twice_or_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="once"):
        insert_spectral_norm(insert_spectral_norm(network(), 1), 1)
    with pytest.raises(ModelError, match="no convolution"):
        insert_spectral_norm(nn.Sequential(nn.BatchNorm2d(1)), 1)


def test_a_pruned_weight_does_not_count_in_a_clipped_norm() -> None:
    model = nn.Linear(1, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0], [4.0]])
    keeper = MaskKeeper(
        [],
        inherit=False,
        context_seed=0,
        example=torch.zeros(1),
        threat=Threat("linf", 0.1),
        held=Masks({"weight": torch.tensor([[1.0], [0.0]])}),
    )
    step = Step(keeper.prepare_model(model), 0, 1, 0.5, Threat("linf", 0.1), seeded())
    for defense in (keeper, GradientClipping(1.5)):
        defense.after_backward(step)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.5], [0.0]]), rtol=1e-4, atol=0)


def test_masks_reach_below_a_spectral_norm() -> None:
    model = insert_spectral_norm(network(), 1)
    mask = torch.ones(6, 256)
    mask[:, ::2] = 0
    Masks({"3.weight": mask}).apply_(model)
    restored = SpectralNorm().restore_model(model)
    assert torch.equal(restored.get_parameter("3.weight") != 0, mask.bool())
