"""Batch norms folded into frozen convolutions: the numbers of the plain passes, and only where they may be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.densenet import DenseNet

from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import FrozenModel, frozen
from robustkit.defenses.inner import cross_entropy_score, input_gradient, pgd_examples
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.resnet import resnet18
from robustkit.models.small_cnn import SmallCnn
from robustkit.models.wide_resnet import WideResNet
from robustkit.train.checkpointing import blocks_of, checkpointed
from robustkit.train.modes import attack_mode

SHAPE = (3, 16, 16)


class Norms(TorchDispatchMode):
    """Counts batch norms that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.native_batch_norm.default
        return func(*args, **(kwargs or {}))


def images(number: int = 4) -> Tensor:
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lively(model: nn.Module) -> nn.Module:
    """Give each batch norm statistics, scales and shifts of its own, some of them negative; in float64."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return model.double()


def gradient(passes: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return input_gradient(passes, cross_entropy_score(torch.arange(len(x)) % 5), x)


def check(model: nn.Module, *, left: int, passes: int = 3) -> FrozenModel:
    """Check the passes of a frozen model against plain ones; `left`: batch norms that the later passes compute."""
    with frozen(model, passes=9) as quick:
        for number in range(passes):
            x = images() / (1 + number)
            with attack_mode(model):
                wanted_logits, wanted = model(x).detach(), gradient(model, x)
            torch.testing.assert_close(quick(x).detach(), wanted_logits, rtol=1e-9, atol=1e-9)
            with Norms() as counted:
                found = gradient(quick, x)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
            assert counted.count == left
    return quick


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (lambda: resnet18(SHAPE, 5, width=4), 0),
        # Of a pooled group the first batch norm comes behind the pooling.
        (lambda: SmallCnn(SHAPE, 5, [4, 6]), 2),
        (lambda: SmallCnn(SHAPE, 5, [4, 6], extra=1, whiten="frozen"), 2),
        (lambda: BaselineCnn(SHAPE, 5, widths=[4, 6], hidden=8, batch_norm=True), 0),
        # The first batch norm of a block comes before its convolution, and of the last there is one more.
        (lambda: WideResNet(SHAPE, 5, depth=10, width=1), 4),
    ],
)
def test_passes_are_the_plain_ones(model: Callable[[], nn.Module], left: int) -> None:
    torch.manual_seed(0)
    check(lively(model()), left=left)


class Two(nn.Module):
    """A convolution with a batch norm whose output also goes where `use` takes it."""

    def __init__(self, use: str, **convolution: Any) -> None:
        super().__init__()
        self.use, self.calls = use, 0
        self.conv = nn.Conv2d(3, 6, 3, **convolution)
        self.norm, self.other = nn.BatchNorm2d(6, affine=use != "plain"), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def maps(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.conv(x)
        if self.use == "list":
            return torch.cat([self.norm(y), y], 1)[:, 3:9]
        if self.use == "sum":
            return self.norm(y) + 0.5 * y
        if self.use == "before":
            return y.tanh() * self.norm(y)
        if self.use == "both":
            return self.norm(y) * self.other(y)
        if self.use == "twice":
            return self.norm(y) + self.norm(self.conv(x.flip(3)))
        if self.use == "turns":
            return self.norm(y) if self.calls <= 2 else self.other(y)
        if self.use == "later":
            return self.norm(y) if self.calls <= 2 else y.relu()
        if self.use == "batch":
            return F.batch_norm(y, None, None, training=True)
        return F.relu(self.norm(y), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(x).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("use", "left"), [("list", 1), ("sum", 1), ("before", 1), ("both", 2), ("twice", 2), ("batch", 1)]
)
def test_a_convolution_that_something_else_uses_is_left_alone(use: str, left: int) -> None:
    check(lively(Two(use)), left=left)


@pytest.mark.parametrize(
    "convolution",
    [{}, {"stride": 2, "padding": 1}, {"bias": False}, {"dilation": 2}, {"groups": 3}, {"padding": "same"}],
)
def test_every_kind_of_convolution_can_be_folded(convolution: dict[str, Any]) -> None:
    check(lively(Two("plain", **convolution)), left=0)


@pytest.mark.parametrize("use", ["turns", "later"])
def test_a_pass_that_goes_another_way_is_repeated_without_folding(use: str) -> None:
    model = lively(Two(use))
    x = images()
    with frozen(model, passes=9) as quick:
        first = quick(x)
        torch.testing.assert_close(quick(x), first, rtol=1e-9, atol=1e-9)
        with attack_mode(model):
            wanted = model(x)  # the other way from here on
        assert not torch.allclose(wanted, first)
        for _ in range(2):
            torch.testing.assert_close(quick(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["conv.weight", "norm.running_var", "norm.bias"])
def test_what_was_changed_meanwhile_is_not_taken_from_before(what: str) -> None:
    model = lively(Two("relu"))
    x = images()
    with frozen(model, passes=9) as quick:
        for _ in range(2):
            quick(x)
        with torch.no_grad():
            model.state_dict(keep_vars=True)[what].mul_(1.5)
        torch.testing.assert_close(quick(x), model(x), rtol=1e-9, atol=1e-9)


def test_filters_that_are_computed_in_each_pass_are_left_alone() -> None:
    masked = Two("relu")
    prune.l1_unstructured(masked.conv, "weight", 0.5)
    check(lively(masked), left=1)
    normed = Two("relu")
    parametrizations.spectral_norm(normed.conv)
    check(lively(normed), left=1)


def test_blocks_that_are_computed_again_are_not_folded() -> None:
    torch.manual_seed(0)
    model = lively(resnet18(SHAPE, 5, width=4))
    x = images()
    with attack_mode(model):
        wanted = gradient(model, x)
    with checkpointed(model, blocks_of(model)), frozen(model, passes=9) as quick:
        for _ in range(3):
            torch.testing.assert_close(gradient(quick, x), wanted, rtol=1e-9, atol=1e-12)


class Again(Two):
    """`Two` with a part that the model itself computes again in the backward."""

    def maps(self, x: Tensor) -> Tensor:
        if self.use == "both":
            return again(lambda h: self.norm(self.conv(h)), x)
        if self.use == "convolution":
            return self.norm(again(self.conv, x))
        return again(lambda y: self.norm(y).tanh(), self.conv(x))


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = checkpoint(function, x, use_reentrant=False)
    return found


@pytest.mark.parametrize("use", ["both", "convolution", "norm"])
@pytest.mark.parametrize("first", [True, False])
def test_what_a_model_computes_again_is_left_alone(use: str, first: bool) -> None:
    model = lively(Again(use))
    x = images()
    with attack_mode(model):
        wanted = gradient(model, x)
    with frozen(model, passes=9) as quick:
        if first:
            with torch.no_grad():
                quick(x)
        for _ in range(3):
            torch.testing.assert_close(gradient(quick, x), wanted, rtol=1e-9, atol=1e-12)


def test_a_densenet_that_saves_memory() -> None:
    torch.manual_seed(0)
    model = lively(DenseNet(8, (2, 2), 8, memory_efficient=True, num_classes=5))
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with attack_mode(model):
        wanted = gradient(model, x)
    with frozen(model, passes=9) as quick:
        for _ in range(3):
            torch.testing.assert_close(gradient(quick, x), wanted, rtol=1e-9, atol=1e-12)


def test_outputs_that_go_elsewhere_are_not_kept() -> None:
    class Chain(nn.Sequential):
        """Convolutions with activations alone, and what is left of their outputs."""

        def forward(self, x: Tensor) -> Tensor:
            self.outputs: list[weakref.ref[Tensor]] = []
            for convolution in self:
                y = convolution(x)
                self.outputs.append(weakref.ref(y))
                x = y.relu()
            self.left = sum(output() is not None for output in self.outputs[:-1])
            return x.mean((2, 3))

    chain = Chain(*(nn.Conv2d(width, 6, 3) for width in (3, 6, 6, 6))).double()
    with frozen(chain, passes=9) as quick:
        for _ in range(2):
            quick(images())
            assert chain.left == 0


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_compiled_is_not_folded(whole: bool) -> None:
    """Whichever way it is compiled; a compiler would keep the filters of the attack that it saw first."""
    torch.manual_seed(0)
    model = lively(resnet18(SHAPE, 5, width=4))
    compiled = model
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        next(iter(model.children())).compile(backend="eager")
    for _ in range(2):
        check(compiled, left=20)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_what_stands_between_convolution_and_batch_norm_sees_the_convolution() -> None:
    """A hook that reads the output, and one that changes it."""
    model = lively(Two("relu"))
    seen: list[float] = []
    model.conv.register_forward_hook(lambda _, __, y: seen.append(float(y.detach().square().sum())))
    check(model, left=1)
    assert len({round(value, 6) for value in seen}) == 3
    changed = lively(Two("relu"))
    changed.conv.register_forward_hook(lambda _, __, y: y.clamp(min=0))
    check(changed, left=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_examples_are_found_as_without_folding(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = lively(resnet18(SHAPE, 5, width=4)).float()
    x, y = images().float(), torch.arange(4)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            found = pgd_examples(
                model,
                x,
                y,
                Threat("linf", 0.03),
                steps=5,
                alpha=0.01,
                generator=torch.Generator().manual_seed(0),
            )
        assert found.dtype == torch.float32
        with attack_mode(model), torch.no_grad():
            return F.cross_entropy(model(found), y, reduction="none")

    with attack_mode(model), torch.no_grad():
        clean = F.cross_entropy(model(x), y, reduction="none")
    folded = losses()
    monkeypatch.setattr("robustkit.defenses.frozen.is_replaced", lambda model: True)
    plain = losses()
    assert (plain > clean).all()
    torch.testing.assert_close(folded - clean, plain - clean, rtol=0.1 if dtype else 1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_filters_are_cast_once_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps what it cast only of parameters that take a gradient; float64 it leaves alone."""
    model = lively(Two("relu")).to(dtype)
    x, seen = images().to(dtype), []
    monkeypatch.setattr("robustkit.defenses.frozen._run", lambda call: seen.append(call) or call.plain())
    with frozen(model, passes=3) as run:
        for autocast in (True, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = run(x.requires_grad_())
            assert torch.isfinite(logits).all()
    lower = torch.bfloat16 if dtype == torch.float32 else dtype
    first, second, third, plain = (call.weight for call in seen)
    assert first is model.conv.weight
    assert second is third
    assert second.dtype == seen[1].bias.dtype == lower
    assert plain.dtype == dtype
