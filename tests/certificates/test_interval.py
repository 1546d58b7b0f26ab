"""Interval bounds against closed forms, enumeration and samples: they hold everywhere, exactly where they can."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import robustkit
from robustkit.attacks.threat import Threat
from robustkit.certificates.boxes import DIPS, LOWEST, MONOTONE_LAYERS, Box, through_layer
from robustkit.certificates.interval import Interval, interval_margins
from robustkit.errors import InternalError, ModelError
from robustkit.models.baseline_cnn import BaselineCnn
from robustkit.models.normalized import Normalized, Repeated
from robustkit.models.resnet import resnet18
from robustkit.models.small_cnn import SmallCnn
from robustkit.models.wide_resnet import WideResNet

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import oracles

EPS = 0.05


def moved(model: nn.Module) -> nn.Module:
    """A model in eval mode whose batch norms have seen something."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def real_margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    return (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.05, 0.2])
def test_on_a_linear_model_the_bound_is_the_exact_worst_case(eps: float) -> None:
    """The last layer is merged with the margins, so that nothing is lost; the box [0, 1] counts."""
    x, y = oracles.digits()
    x, y = x[:200], y[:200]
    model = oracles.softmax_regression().eval()
    exact = oracles.slack(model, x, y, "linf", eps * (1 + 1e-4) + 1e-6)
    found = interval_margins(model, x, y, Threat("linf", eps)).amin(1)
    assert torch.allclose(found, torch.from_numpy(exact), atol=1e-9)


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_on_a_linear_model_exactly_the_robust_examples_are_certified(eps: float) -> None:
    x, y = oracles.digits()
    model = oracles.softmax_regression()
    slack = oracles.slack(model, x, y, "linf", eps)
    certified = robustkit.certify(model, x, y, threat=Threat("linf", eps)).outcomes["interval"].certified
    clear = abs(slack) > 2e-3
    assert clear.mean() > 0.98
    assert (certified == (slack > 0))[clear].all()
    assert 0.01 < certified.mean() < 0.99


def test_a_tiny_net_against_every_point_of_a_grid() -> None:
    """Two pixels, 401 x 401 points: no margin is below its bound, and with one hidden unit the bound is reached."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y, eps = torch.rand(5, 2), torch.tensor([0, 1, 2, 0, 1]), 0.2
    bound = interval_margins(net, x, y, Threat("linf", eps))
    steps = torch.linspace(-eps, eps, 401)
    grid = torch.cartesian_prod(steps, steps)
    points = [((one + grid).clamp(0, 1), label.expand(len(grid))) for one, label in zip(x, y, strict=True)]
    lowest = torch.stack([real_margins(net, images, labels).amin(0) for images, labels in points])
    assert (lowest.double() >= bound - 1e-6).all()
    single = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    bound = interval_margins(single, torch.tensor([[0.5]]), torch.tensor([0]), Threat("linf", eps))
    lowest = real_margins(single, 0.5 + steps[:, None], torch.zeros(401, dtype=torch.int64)).amin(0)
    assert float(lowest[1]) == pytest.approx(float(bound[0, 1]), abs=1e-4)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "baseline": (lambda: BaselineCnn((1, 16, 16), 4), (1, 16, 16)),
    "baseline with everything": (lambda: BaselineCnn((1, 16, 16), 4, True, True, 0.5), (1, 16, 16)),
    "small": (lambda: SmallCnn((1, 8, 8), 4, [3, 4]), (1, 8, 8)),
    "residual": (lambda: resnet18((3, 8, 8), 4, 2), (3, 8, 8)),
    "wide": (lambda: WideResNet((3, 8, 8), 4, 10, 1, 0.3), (3, 8, 8)),
    "gray as colour": (lambda: Repeated(WideResNet((3, 8, 8), 4, 10, 1)), (1, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**31 - 1), eps=st.floats(0, 0.2), norm=st.sampled_from(["linf", "l2", "l1"]))
@settings(max_examples=4, deadline=None)
def test_every_point_of_the_ball_keeps_to_the_bounds(name: str, seed: int, eps: float, norm: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    model = moved(Normalized(build(), [0.4] * shape[0], [0.3] * shape[0]))
    x, y = torch.rand(3, *shape), torch.randint(4, (3,))
    bound = interval_margins(model, x, y, Threat(norm, eps))  # type: ignore[arg-type]
    corner = torch.where(torch.rand(20, *x.shape) < 0.5, -eps, eps)
    delta = torch.cat([corner, corner * torch.rand_like(corner), torch.zeros_like(corner[:1])])
    if norm != "linf":
        order = {"l2": 2.0, "l1": 1.0}[norm]
        size = torch.linalg.vector_norm(delta.flatten(2), ord=order, dim=2).clamp_min(1e-12)
        delta = delta * (eps / size).clamp(max=1)[..., None, None, None]
    for one in delta:
        real = real_margins(model, (x + one).clamp(0, 1), y).double()
        assert (real - bound >= -1e-4 * (1 + real.abs()))[real.isfinite()].all()


@pytest.mark.parametrize("layer", [*[kind() for kind in DIPS], nn.GELU(approximate="tanh")], ids=lambda one: repr(one))
def test_bounds_of_an_activation_with_a_dip_are_its_exact_range(layer: nn.Module) -> None:
    torch.manual_seed(0)
    low = 8 * torch.rand(300, dtype=torch.float64) - 6
    high = low + 4 * torch.rand(300, dtype=torch.float64) ** 2
    found = through_layer(layer, Box(low, high))
    points = layer(low + (high - low) * torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None])
    assert torch.allclose(found.upper, points.amax(0), atol=1e-12)
    assert (found.lower <= points.amin(0) + 1e-12).all()
    assert torch.allclose(found.lower, points.amin(0), atol=1e-7)


@pytest.mark.parametrize("name", LOWEST)
def test_each_dip_falls_before_its_lowest_point_and_rises_after_it(name: str) -> None:
    function = {
        "gelu": functional.gelu,
        "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "mish": functional.mish,
        "hardswish": functional.hardswish,
    }[name]
    line = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    values = function(line)
    # Far out GELU is a difference of nearly equal numbers: its last bits go up and down.
    rising = values.diff() >= -1e-14
    falling = values.diff() <= 1e-14
    before = line[1:] <= LOWEST[name]
    assert (falling | ~before).all()
    assert (rising | (line[:-1] < LOWEST[name])).all()


@pytest.mark.parametrize("kind", MONOTONE_LAYERS, ids=lambda kind: kind.__name__)
def test_a_layer_that_counts_as_monotone_never_falls(kind: type[nn.Module]) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "Unflatten": (1, (2, 4)), "PixelShuffle": (2,), "ChannelShuffle": (2,),
        "ConstantPad1d": (1, 0.5), "ConstantPad2d": (1, 0.5),
    }  # fmt: skip
    sized = ("Pool", "Pad") if "Adaptive" not in kind.__name__ else ("Pool",)
    default = (2,) if any(part in kind.__name__ for part in sized) else ()
    if kind.__name__.startswith(("ZeroPad", "Reflection", "Replication")):
        default = (1,)
    layer = kind(*arguments.get(kind.__name__, default)).eval()
    dimensions = {"1d": (2, 4, 6), "2d": (2, 4, 6, 6), "3d": (2, 4, 6, 6, 6)}
    shape = dimensions.get(kind.__name__[-2:], (2, 8) if kind is nn.Unflatten else (2, 4, 6, 6))
    torch.manual_seed(0)
    x = 6 * torch.rand(shape, dtype=torch.float64) - 3
    y = x + torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) < 0.3)
    assert (layer(y) >= layer(x)).all()


class Functional(nn.Module):
    """Functions and methods in place of layers, with every kind of arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate")
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.tensor([-0.5, 2.0, 1.0, -1.0]).view(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.conv(x)) * self.scale
        y = functional.max_pool2d(y, 2) - functional.avg_pool2d(-y / 2, 2) + 0.3
        y += functional.silu(y)
        y = torch.cat([y.mean((2, 3)), 1 - functional.adaptive_avg_pool2d(y, 1).view(y.size(0), -1)], dim=1)
        y = functional.dropout(y, 0.5, self.training)
        logits: Tensor = self.head(torch.clamp(y, -3, 3)).float()
        return logits


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10, deadline=None)
def test_functions_and_arithmetic(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = Functional().eval(), torch.rand(2, 2, 4, 4), torch.randint(3, (2,))
    bound = interval_margins(model, x, y, Threat("linf", 0.1))
    for _ in range(50):
        point = (x + torch.where(torch.rand_like(x) < 0.5, -0.1, 0.1) * torch.rand(2, 1, 1, 1)).clamp(0, 1)
        assert (real_margins(model, point, y).double() >= bound - 1e-5).all()
    assert bool((interval_margins(model, x, y, Threat("linf", 0.0)) >= real_margins(model, x, y).double() - 1e-3).all())


class InPlace(nn.Module):
    """Layers and functions that write into their input, which is used again after them."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first, self.head = nn.Linear(6, 8), nn.Linear(20, 3)
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.acts = nn.ModuleList([nn.SiLU(inplace), nn.Hardswish(inplace), nn.Mish(inplace)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y
        for act in self.acts:
            z = act(z)
        y = y if self.inplace else z
        one, two = functional.linear(y, self.weight).chunk(2, dim=1)
        one = one.clone()
        three = functional.relu(one, inplace=self.inplace)
        one = one if self.inplace else three
        logits: Tensor = self.head(torch.cat([y, z, one, two], dim=1))
        return logits


def test_what_is_changed_in_place_is_changed_for_all_who_hold_it() -> None:
    torch.manual_seed(0)
    plain, inplace = InPlace(False).eval(), InPlace(True).eval()
    with torch.no_grad():
        plain.first.weight.mul_(8)  # so that boxes lie around the dips
    inplace.load_state_dict(plain.state_dict())
    x, y = torch.rand(5, 6), torch.randint(3, (5,))
    assert torch.allclose(plain(x), inplace(x))
    bounds = [interval_margins(model, x, y, Threat("linf", 0.1)) for model in (plain, inplace)]
    assert torch.equal(*bounds)
    for _ in range(100):
        point = (x + 0.1 * torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0)).clamp(0, 1)
        assert (real_margins(plain, point, y).double() >= bounds[0] - 1e-5).all()


def test_merging_the_last_layer_is_tighter_than_bounds_of_the_logits() -> None:
    torch.manual_seed(0)
    net = moved(SmallCnn((1, 8, 8), 4, [3, 4]))
    x, y = torch.rand(4, 1, 8, 8), torch.randint(4, (4,))
    merged = interval_margins(net, x, y, Threat("linf", EPS))
    apart = interval_margins(nn.Sequential(net, Doubled()), x, y, Threat("linf", EPS)) / 2
    finite = torch.isfinite(merged)
    assert (merged[finite] >= apart[finite] - 1e-12).all()
    assert (merged[finite] > apart[finite] + 1e-3).double().mean() > 0.5


class Doubled(nn.Module):
    """Not a linear layer at the end, so that nothing is merged."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_an_example_may_have_its_own_eps() -> None:
    x, y = oracles.digits()
    model = oracles.softmax_regression().eval()
    eps = torch.linspace(0, 0.2, 50)
    found = interval_margins(model, x[:50], y[:50], Threat("linf", eps))
    for place in (0, 20, 49):
        alone = interval_margins(model, x[place : place + 1], y[place : place + 1], Threat("linf", float(eps[place])))
        assert torch.allclose(found[place], alone[0])


class Branching(nn.Module):
    """Computes something else for dark images, in a way that no trace can see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.seen = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        if isinstance(x, Tensor) and not isinstance(x, torch.fx.Proxy):
            logits = -logits
        return logits


class Asking(nn.Module):
    """Decides by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] if x.sum() > 0 else x[:, 2:]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)), "layer 1 is LayerNorm"),
        (Normalized(nn.Sequential(nn.Flatten(), nn.PReLU(), nn.Linear(4, 2)), [0.0], [1.0]), "layer 1 is PReLU"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False)), "statistics of the batch"),
        (Asking(), "torch.fx, which cannot trace Asking"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().half(), "weights of torch.float16"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1)), "layer 2 is Softmax"),
    ],
    ids=["unknown layer", "unknown layer inside", "batch statistics", "untraceable", "half", "softmax"],
)
def test_what_has_no_bounds_is_named(model: nn.Module, message: str) -> None:
    shape = (3, 1, 2, 2) if not isinstance(model, Asking) else (3, 4)
    with pytest.raises(ModelError, match=message) as caught:
        interval_margins(model.eval(), torch.rand(shape), torch.tensor([0, 1, 0]), Threat("linf", 0.1))
    if "layer" in message:
        assert "randomized_smoothing" in str(caught.value)


def test_a_model_that_is_not_what_was_traced_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.rand(8, 4)
    y = model.head(x).argmax(1)
    with pytest.raises(InternalError, match="outside of their bounds"):
        Interval()(model, x, y, Threat("linf", 0.01), generator=torch.Generator())


def test_logits_that_are_no_numbers_certify_nothing() -> None:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    found = Interval()(model.eval(), torch.rand(3, 4), torch.tensor([0, 1, 0]), Threat("linf", 0.0),
                       generator=torch.Generator())  # fmt: skip
    assert not found.certified.any()
    assert (found.prediction == -1).all()


def interval_training(eps: float, epochs: int = 25) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net on the digits, trained with its own interval bounds (Gowal et al. 2018, section 4)."""
    torch.manual_seed(0)
    x, y = oracles.digits()
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 64), nn.ReLU(),
                        nn.Linear(64, 10))  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(epochs):
        for index in torch.randperm(1300).split(65):
            box = Box((x[index] - eps).clamp(0, 1), (x[index] + eps).clamp(0, 1))
            for layer in net:
                box = through_layer(layer, box)
            worst = torch.where(functional.one_hot(y[index], 10).bool(), box.lower, box.upper)
            share = min(0.7, epoch / epochs)
            loss = functional.cross_entropy(net(x[index]), y[index]) * (1 - share)
            loss = loss + share * functional.cross_entropy(worst, y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net, x[1300:], y[1300:]


def test_certified_accuracy_is_a_lower_bound_of_what_attacks_leave() -> None:
    net, x, y = interval_training(0.05)
    threat = Threat("linf", 0.05)
    attacked = robustkit.evaluate(net, x, y, threat=threat, attacks=["noise", "fgsm", {"pgd": {"steps": 20}}])
    found = robustkit.certify(net, x, y, threat=threat, against=attacked)
    assert (found.outcomes["interval"].certified <= attacked.correct).all()
    assert 0.3 < found.certified["interval"].value <= attacked.worst.value < attacked.clean.value
    wider = robustkit.certify(net, x, y, threat=Threat("linf", 0.1)).certified["interval"]
    assert wider.value < found.certified["interval"].value
    assert "interval" in repr(found)
    radius = found.outcomes["interval"].radius
    assert sorted({round(float(one), 4) for one in radius}) == [0.0, 0.05]
    assert found.outcomes["interval"].forwards == 3 * len(y)


def test_a_certificate_of_an_orthogonal_net_is_held_by_attacks() -> None:
    """1-Lipschitz in l2 by construction: attacks cannot reach examples whose margin is above sqrt(2) eps."""
    torch.manual_seed(0)
    layers = [nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)) for _ in range(2)]
    net = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(64, 10, bias=False))
    x, y = oracles.digits()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for index in torch.randperm(len(x)).repeat(4).split(128):
        loss = functional.cross_entropy(20 * normalized_head(net, x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        net[5].weight.div_(torch.linalg.matrix_norm(net[5].weight, 2))
    eps = 0.05
    logits = net(x).detach()
    margin = real_margins(net.eval(), x, y).amin(1)
    lipschitz = (margin > math.sqrt(2) * eps + 1e-4).numpy()
    attacked = robustkit.evaluate(net, x, y, threat=Threat("l2", eps), attacks=[{"pgd": {"steps": 20}}])
    assert logits.shape == (len(x), 10)
    assert lipschitz.mean() > 0.3
    assert attacked.correct[lipschitz].all()


def normalized_head(net: nn.Sequential, x: Tensor) -> Tensor:
    for layer in net[:5]:
        x = layer(x)
    return x @ (net[5].weight / torch.linalg.matrix_norm(net[5].weight, 2)).T
