"""The models that the attack benchmark judges: trained by the shipped recipes, and two certified nets trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.data.load import load_dataset
from robustkit.data.split import SUBSET_SEED, Dataset
from robustkit.models.artefact import load_model
from robustkit.recipe.schema import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SCALE = 100.0


@dataclass(frozen=True)
class Subject:
    """A model with the examples it is judged on, x (N, C, H, W) in [0, 1]."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    role: str
    """`tuned`: looked at while the cascade's schedule was chosen; `judged`: not."""


class Scaled(nn.Module):
    """A model whose logits are so large that cross-entropy saturates, as after defensive distillation at T = 100
    (Carlini & Wagner 2017, arXiv 1608.04644, section VI)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits."""
        logits: Tensor = self.model(x)
        return SCALE * logits


def recipe_data(name: str, overrides: tuple[str, ...]) -> Dataset:
    """Return the data of a shipped recipe."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    return load_dataset(recipe.data, validation=0.1, folder=recipe.folder)


def examples(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Return the first test examples in the order in which recipes take them."""
    order = np.random.default_rng(SUBSET_SEED).permutation(len(data.test))[:count]
    index = torch.from_numpy(order.copy())
    return data.test.images[index].float() / 255, data.test.labels[index].to(torch.int64)


def trained(run: Path, variant: str) -> nn.Module:
    """Return the model of a variant in a run folder.

    Raises:
        SystemExit: the run or the variant is not there.
    """
    for record in sorted(run.glob("steps/*/record.json")):
        weights = record.parent / "model.safetensors"
        if weights.exists() and json.loads(record.read_bytes()).get("variant") == variant:
            return load_model(weights).eval()
    raise SystemExit(f"{run} holds no {variant}; first: robustkit run recipes/{run.name}.yaml")


def certified(data: Dataset, eps: float, cache: Path, epochs: int, count: int) -> nn.Module:
    """Return a net trained on its interval bounds (Gowal et al. 2018, arXiv 1810.12715); kept in the cache."""
    channels, side = data.shape[0], data.shape[1] // 2
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, len(data.classes)),
    )
    if cache.exists():
        net.load_state_dict(torch.load(cache, weights_only=True))
        return net.eval()
    images, labels = data.train.images[:count].float() / 255, data.train.labels[:count].to(torch.int64)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    steps = epochs * (len(labels) // 128)
    done = 0
    for _ in range(epochs):
        for index in torch.randperm(len(labels)).split(128):
            share = min(1.0, max(0.0, done / steps - 0.1) / 0.5)
            _certified_step(net, images[index], labels[index], eps, share, optimizer)
            done += 1
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), cache)
    return net.eval()


def _certified_step(
    net: nn.Sequential, x: Tensor, y: Tensor, eps: float, share: float, optimizer: torch.optim.Optimizer
) -> None:
    low, high = (x - share * eps).clamp(0, 1), (x + share * eps).clamp(0, 1)
    for layer in net:
        low, high = _bounds(layer, low, high)
    worst = torch.where(F.one_hot(y, low.shape[1]).bool(), low, high)
    loss = (1 - share / 2) * F.cross_entropy(net(x), y) + share / 2 * F.cross_entropy(worst, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _bounds(layer: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    middle, radius = (low + high) / 2, (high - low) / 2
    if isinstance(layer, nn.Conv2d):
        radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
    elif isinstance(layer, nn.Linear):
        radius = F.linear(radius, layer.weight.abs())
    else:
        return layer(low), layer(high)
    middle = layer(middle)
    return middle - radius, middle + radius


def subjects(runs: Path, cifar: str | None, count: int) -> dict[str, Callable[[], Subject]]:
    """Return the subjects by name, each made when it is called.

    `runs`: where the shipped recipes were run; `cifar`: the folder of JPEGs of `cifar10-defenses`' run.
    """
    fashion = ("fashion-mnist", ())
    folder = (f"data={{image_folder: {{root: {cifar}}}}}",) if cifar else ()
    digits, colours = ("quickstart", ()), ("cifar10-defenses", folder)

    def made(recipe: tuple[str, tuple[str, ...]], variant: str, eps: float, role: str, scaled: bool = False) -> Subject:
        x, y = examples(recipe_data(*recipe), count)
        model = trained(runs / recipe[0], variant)
        name = f"{recipe[0]}/{variant}" + (" logits x 100" if scaled else "")
        return Subject(name, Scaled(model).eval() if scaled else model, x, y, eps, role)

    def bound(recipe: tuple[str, tuple[str, ...]], epochs: int, size: int, role: str) -> Subject:
        data = recipe_data(*recipe)
        model = certified(data, 0.1, runs / "benchmark" / f"certified-{recipe[0]}.pt", epochs, size)
        return Subject(f"{recipe[0]}/certified", model, *examples(data, count), 0.1, role)

    return {
        "digits": lambda: made(digits, "n-fgsm", 0.1, "tuned"),
        "digits-certified": lambda: bound(digits, 60, 2000, "tuned"),
        "fashion": lambda: made(fashion, "n-fgsm", 0.1, "tuned"),
        "fashion-certified": lambda: bound(fashion, 8, 20000, "tuned"),
        "fashion-pruned-95": lambda: made(fashion, "n-fgsm-pruned-95", 0.1, "judged"),
        "fashion-masked": lambda: made(fashion, "trades", 0.1, "tuned", scaled=True),
        "cifar": lambda: made(colours, "n-fgsm", 8 / 255, "judged"),
        "cifar-masked": lambda: made(colours, "pgd-at", 8 / 255, "judged", scaled=True),
        "cifar-trades": lambda: made(colours, "trades", 8 / 255, "judged"),
        "cifar-pruned-95": lambda: made(colours, "n-fgsm-pruned-95", 8 / 255, "judged"),
        "fashion-undefended": lambda: made(fashion, "baseline", 0.1, "judged"),
    }
