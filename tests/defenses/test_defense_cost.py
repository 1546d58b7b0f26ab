"""What a step of adversarial training computes, counted operation by operation; and the quick gradient of a stem."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import FrozenConvolutions, frozen
from robustkit.defenses.inner import cross_entropy_score, input_gradient, pgd_examples
from robustkit.defenses.thin import thin_input_gradient
from robustkit.models.small_cnn import SmallCnn
from robustkit.train.hooks import Batch, Defense, Step
from robustkit.train.step import train_step

THREAT = Threat("linf", 0.1)


class Counted(TorchDispatchMode):
    """Counts convolutions, and the backwards of convolutions by whether they take input and weight gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0
        self.backwards: Counter[tuple[bool, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.forwards += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.backwards[args[-1][0], args[-1][1]] += 1
        return func(*args, **(kwargs or {}))


def network() -> SmallCnn:
    torch.manual_seed(0)
    return SmallCnn((1, 8, 8), 10, [8, 16])


def count(defenses: list[Defense]) -> Counted:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    step = Step(model, 0, 1, 0.5, THREAT, generator)
    batch = Batch(torch.rand(4, 1, 8, 8, generator=generator), torch.arange(4), torch.arange(4), 10)
    with Counted() as counted:
        train_step(model, batch, [(defense, step) for defense in defenses], optimizer, precision=None)
    return counted


def defense(name: str, **parameters: Any) -> Defense:
    made = registry.create(registry.find("defense", name), parameters)
    assert isinstance(made, Defense)
    return made


@pytest.mark.parametrize(
    ("name", "parameters", "inner_forwards", "inner_backwards", "outer"),
    [
        ("fgsm", {}, 1, 1, 1),
        ("fgsm_rs", {}, 1, 1, 1),
        ("n_fgsm", {}, 1, 1, 1),
        ("pgd_training", {"steps": 3}, 3, 3, 1),
        ("trades", {"steps": 3}, 4, 3, 2),  # the clean logits that it climbs away from are one more forward
        ("mart", {"steps": 3}, 3, 3, 2),
    ],
)
def test_the_inner_maximisation_takes_no_weight_gradient_and_no_pass_too_many(
    name: str, parameters: dict[str, Any], inner_forwards: int, inner_backwards: int, outer: int
) -> None:
    convolutions = 4  # of small_cnn with two widths
    counted = count([defense(name, **parameters)])
    assert counted.forwards == convolutions * (inner_forwards + outer)
    # The stem's input gradient is no convolution; its weights have one an outer pass, and no input gradient.
    assert counted.backwards == {
        (True, False): (convolutions - 1) * inner_backwards,
        (True, True): (convolutions - 1) * outer,
        (False, True): outer,
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("channels", "kernel", "padding"), [(3, (3, 3), (1, 1)), (1, (5, 3), (2, 0)), (4, (1, 1), (0, 0))]
)
def test_a_stems_quick_gradient_is_the_convolutions(
    channels: int, kernel: tuple[int, int], padding: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of two images, so that five take three.
    monkeypatch.setattr("robustkit.defenses.thin.CHUNK", 2 * kernel[0] * kernel[1] * channels * 9 * 7)
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(channels, 6, kernel, padding=padding, bias=bias).double().requires_grad_(False)
    x = torch.rand(5, channels, 9, 7, generator=generator, dtype=torch.float64).requires_grad_()
    direct = convolution(x)
    gradient = torch.rand(direct.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(direct, x, gradient)
    with FrozenConvolutions(fold=False):
        quick = convolution(x)
    assert "ThinConvolution" in type(quick.grad_fn).__name__
    assert torch.equal(quick, direct)
    (found,) = torch.autograd.grad(quick, x, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(thin_input_gradient(gradient, convolution.weight, padding, (9, 7)), wanted)


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(8, 4, 3), nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(3, 3, 3, groups=3)],
)
def test_other_convolutions_are_left_alone(convolution: nn.Conv2d) -> None:
    x = torch.rand(2, convolution.in_channels, 9, 9).requires_grad_()
    with FrozenConvolutions(fold=False):
        assert "Thin" not in type(convolution.requires_grad_(False)(x).grad_fn).__name__
        trainable = nn.Conv2d(3, 4, 3)
        assert "Thin" not in type(trainable(torch.rand(2, 3, 9, 9).requires_grad_()).grad_fn).__name__


def test_a_stems_gradient_keeps_the_images_layout() -> None:
    model = network().to(memory_format=torch.channels_last).requires_grad_(False)
    wide = nn.Sequential(nn.Conv2d(3, 1, 1), model).requires_grad_(False)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.rand(4, 3, 8, 8).contiguous(memory_format=layout)
        with frozen(wide, passes=9) as passes:
            assert input_gradient(passes, cross_entropy_score(torch.arange(4)), x).is_contiguous(memory_format=layout)


def test_projected_steps_stay_in_ball_and_box_and_go_all_the_way() -> None:
    """On a linear model, where every step has the same sign."""
    weight = torch.linspace(-1, 1, 16).view(1, 1, 4, 4) + 0.01

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rise = (x * weight).sum((1, 2, 3))
            return torch.stack([-rise, rise], 1)

    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, dtype=torch.int64)
    found = pgd_examples(
        Linear(), x, y, THREAT, steps=5, alpha=0.03, generator=torch.Generator().manual_seed(1), start=False
    )
    torch.testing.assert_close(found, (x + 0.1 * weight.sign()).clamp(0, 1))


def test_a_gradient_of_the_quick_gradient_is_the_usual_one() -> None:
    convolution = nn.Conv2d(1, 3, 3, padding=1).double().requires_grad_(False)
    x = torch.rand(2, 1, 5, 5, dtype=torch.float64).requires_grad_()

    def twice() -> Tensor:
        (first,) = torch.autograd.grad(convolution(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    wanted = twice()
    with FrozenConvolutions(fold=False):
        torch.testing.assert_close(twice(), wanted)
