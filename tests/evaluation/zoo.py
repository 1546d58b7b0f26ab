"""Models that hide their gradients, on top of small networks trained on real digits, and honest ones beside them.

Each masked model says what it hides (`bare`: the same network without the mask) and how an attacker who knows it looks
at it (`view`). The accuracy under an attack on these, judged by the masked model, is the truth.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from robustkit.attacks.adaptive import Bpda, Eot

TRAINING = 1400
LEVELS = 8
JPEG_QUALITY = 60


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real 8x8 digits in [0, 1]: images and labels to train on, and to attack."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.from_numpy(bunch.images[order] / 16).to(torch.float32)[:, None]
    x = (x * 255).round() / 255
    y = torch.from_numpy(bunch.target[order]).to(torch.int64)
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]


def network(channels: int = 1, activation: Callable[[], nn.Module] = nn.ReLU, *extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), activation(), nn.Conv2d(16, 32, 3, stride=2, padding=1), activation(),
        *extra, nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def train(
    model: nn.Module,
    *,
    steps: int = 150,
    temperature: float = 1.0,
    teacher: nn.Module | None = None,
    inner: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    lr: float = 3e-3,
    data: tuple[Tensor, Tensor] | None = None,
) -> nn.Module:
    """Train on the digits; `teacher`: on its softened answers; `inner`: on the images that this makes of each batch."""
    x, y = digits()[:2] if data is None else data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        index = torch.randint(0, len(x), (128,), generator=generator)
        batch, labels = x[index], y[index]
        if inner is not None:
            batch = inner(model, batch, labels)
        target: Tensor = labels
        if teacher is not None:
            with torch.no_grad():
                target = (teacher(batch) / temperature).softmax(1)
        optimizer.zero_grad()
        functional.cross_entropy(model(batch) / temperature, target).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.12) -> Tensor:
    """One step from a noisy image (de Jorge et al. 2022)."""
    start = (x + (2 * torch.rand_like(x) - 1) * eps).requires_grad_(True)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(start), y), start)
    return (start + eps * gradient.sign()).detach().clamp(0, 1)


class Sees(nn.Module):
    """A network behind, or before, something else."""

    def __init__(
        self, inner: nn.Module, before: Callable[[Tensor], Tensor] | None, after: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


def rounded(x: Tensor) -> Tensor:
    return (x * (LEVELS - 1)).round() / (LEVELS - 1)


def bit_depth(x: Tensor) -> Tensor:
    """Three bits a pixel, through integers: autograd sees nothing of it (Xu et al. 2018)."""
    return (x * 255).to(torch.uint8).div(32, rounding_mode="floor").float() * 32 / 224


def jpeg(x: Tensor) -> Tensor:
    """Through a JPEG file and back."""
    found = []
    for image in (x.detach()[:, 0] * 255).round().to(torch.uint8).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
        found.append(np.asarray(Image.open(file), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(found))[:, None].to(x.device)


def killed(x: Tensor) -> Tensor:
    return x.detach() + 0 * x


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def resized(x: Tensor) -> Tensor:
    """To a random size and back (Xie et al. 2018)."""
    side = int(torch.randint(6, 13, ()))
    small = functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return functional.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def thermometer(x: Tensor) -> Tensor:
    """Ten channels that say whether a pixel is above 0, 0.1, ..., 0.9 (Buckman et al. 2018)."""
    return (x > torch.arange(10, device=x.device).view(1, 10, 1, 1) / 10).float()


def soft_thermometer(x: Tensor) -> Tensor:
    return torch.sigmoid(20 * (x - 0.05 - torch.arange(10, device=x.device).view(1, 10, 1, 1) / 10))


class KWinners(nn.Module):
    """Keeps the tenth of the activations that are largest (Xiao et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view(x.shape)


class SmoothWinners(nn.Module):
    """What an attacker puts in its place: winners by degrees."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:].detach()
        return (flat * torch.sigmoid(10 * (flat - least))).view(x.shape)


class AlwaysTrains(nn.Module):
    """A module that stays in training mode whatever is asked of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> AlwaysTrains:
        super().train(True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


class DropsAlways(nn.Module):
    """Dropout by a function that is told to be on."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=True)


@dataclass(frozen=True)
class Masked:
    """A model that hides something; `view` is what an adaptive attacker climbs, `bare` the network without the mask."""

    model: nn.Module
    view: nn.Module
    bare: nn.Module


@cache
def fragile() -> nn.Module:
    torch.manual_seed(0)
    return train(network())


@cache
def robust() -> nn.Module:
    torch.manual_seed(0)
    return train(network(), steps=250, inner=n_fgsm)


@cache
def pruned() -> nn.Module:
    """The robust network without half of its weights, tuned as it was trained."""
    model = copy.deepcopy(robust()).requires_grad_(True)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)
    train(model, steps=60, inner=n_fgsm)
    for layer in layers:
        prune.remove(layer, "weight")
    return model.requires_grad_(False)


@cache
def certified() -> nn.Module:
    """Trained on interval bounds (Gowal et al. 2018, arXiv 1810.12715)."""
    torch.manual_seed(7)
    x, y, _, _ = digits()
    first, second = nn.Linear(64, 128), nn.Linear(128, 10)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        index = torch.randint(0, len(x), (128,), generator=generator)
        batch, labels, eps = x[index].flatten(1), y[index], 0.1 * min(1.0, step / 200)
        low, high = _interval(first, (batch - eps).clamp(0, 1), (batch + eps).clamp(0, 1))
        low, high = _interval(second, low.relu(), high.relu())
        worst = torch.where(functional.one_hot(labels, 10).bool(), low, high)
        loss = functional.cross_entropy(second(first(batch).relu()), labels) + functional.cross_entropy(worst, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).eval().requires_grad_(False)


def _interval(layer: nn.Linear, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    middle, radius = layer((low + high) / 2), functional.linear((high - low) / 2, layer.weight.abs())
    return middle - radius, middle + radius


HONEST: dict[str, Callable[[], nn.Module]] = {
    "fragile": fragile, "robust": robust, "pruned": pruned, "certified": certified,
}  # fmt: skip


def _before(mask: Callable[[Tensor], Tensor]) -> Masked:
    return Masked(Sees(fragile(), mask, None), Bpda(mask, fragile()), fragile())


def _after(mask: Callable[[Tensor], Tensor], inner: nn.Module | None = None) -> Masked:
    inner = fragile() if inner is None else inner
    return Masked(Sees(inner, None, mask), inner, inner)


def _random(mask: Callable[[Tensor], Tensor]) -> Masked:
    model = Sees(fragile(), mask, None)
    return Masked(model, Eot(model), fragile())


def distilled() -> Masked:
    """Defensive distillation at temperature 100, used at temperature 1 (Papernot et al. 2016)."""
    torch.manual_seed(1)
    teacher = train(network(), temperature=100.0, lr=3e-2)
    torch.manual_seed(2)
    student = train(network(), temperature=100.0, lr=3e-2, teacher=teacher)
    cool = Sees(student, None, lambda logits: logits / 100)
    return Masked(student, cool, cool)


def winners() -> Masked:
    torch.manual_seed(3)
    model = train(network(1, KWinners), steps=200)
    smooth = network(1, SmoothWinners)
    smooth.load_state_dict(model.state_dict())
    smooth = smooth.eval().requires_grad_(False)
    return Masked(model, smooth, smooth)


def thermometers() -> Masked:
    torch.manual_seed(4)
    inner = network(10)
    train(Sees(inner, thermometer, None))
    model = Sees(inner, thermometer, None)
    view = Bpda(thermometer, inner, soft_thermometer)
    return Masked(model, view, Sees(inner, soft_thermometer, None))


def dropout_on() -> Masked:
    torch.manual_seed(5)
    model = train(network(1, nn.ReLU, DropsAlways()))
    bare = nn.Sequential(*(layer for layer in model if not isinstance(layer, DropsAlways)))  # type: ignore[attr-defined]
    return Masked(model, Eot(model), bare)


def batch_norm_training() -> Masked:
    torch.manual_seed(6)
    norm = nn.BatchNorm2d(32)
    bare = train(network(1, nn.ReLU, norm))
    layers = [AlwaysTrains(layer) if layer is norm else layer for layer in bare]  # type: ignore[attr-defined]
    return Masked(nn.Sequential(*layers), bare, bare)


ZOO: dict[str, Callable[[], Masked]] = {
    "distilled": distilled,
    "loud": lambda: _after(lambda logits: 1e4 * logits),
    "softmax": lambda: _after(lambda logits: logits.softmax(1)),
    "log-softmax": lambda: _after(lambda logits: logits.log_softmax(1)),
    "loud-softmax": lambda: _after(lambda logits: (20 * logits).softmax(1)),
    "rounded": lambda: _before(rounded),
    "bit-depth": lambda: _before(bit_depth),
    "jpeg": lambda: _before(jpeg),
    "killed": lambda: _before(killed),
    "noisy": lambda: _random(noisy),
    "resized": lambda: _random(resized),
    "k-winners": winners,
    "thermometer": thermometers,
    "dropout-on": dropout_on,
    "batch-norm-training": batch_norm_training,
}
