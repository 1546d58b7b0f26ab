"""What a training step of each defense costs in standard steps, on the processor's own clock, in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from turns import quickest

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import FrozenModel
from robustkit.defenses.inner import ascend, cross_entropy_score
from robustkit.models.build import build_model
from robustkit.precision import autocast, has_bf16
from robustkit.recipe.spec import Use
from robustkit.train.hooks import Batch, Step
from robustkit.train.layout import to_channels_last
from robustkit.train.modes import attack_mode
from robustkit.train.optim import Sgd
from robustkit.train.step import train_step

REPEATS = {"standard": 8, "n_fgsm": 5}
"""So that each measurement takes about as long: a short one finds a quick moment of the machine more easily."""
CPU = torch.device("cpu")
SHAPE = (3, 32, 32)
DEFENSES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "standard": None,
    "n_fgsm": ("n_fgsm", {}),
    "pgd_training, 10 steps": ("pgd_training", {"steps": 10}),
    "trades, 10 steps": ("trades", {"steps": 10}),
    "mart, 10 steps": ("mart", {"steps": 10}),
}
MODELS: dict[str, tuple[Use, int]] = {
    "small_cnn": (Use(name="small_cnn", parameters={"widths": [32, 64, 64]}, label="small_cnn"), 128),
    "resnet18": (Use(name="resnet18", label="resnet18"), 16),
}


def model_of(name: str) -> tuple[nn.Module, Batch]:
    """Return a model in the layout that it is trained in, and a batch for it."""
    use, count = MODELS[name]
    torch.manual_seed(0)
    built = build_model(use, shape=SHAPE, classes=10, mean=[0.5] * 3, std=[0.25] * 3)
    model, layout = to_channels_last(built, SHAPE, CPU)
    y = torch.randint(10, (count,))
    return model.train(), Batch(torch.rand(count, *SHAPE).contiguous(memory_format=layout), y, y, 10)


def step_of(name: str, chosen: tuple[str, dict[str, Any]] | None, precision: torch.dtype | None) -> Callable[[], None]:
    """Return one training step of a defense (None: of no defense) on a batch that does not change."""
    model, batch = model_of(name)
    optimizer = Sgd(lr=1e-3).build([{"params": list(model.parameters())}])
    defense = registry.create(registry.find("defense", chosen[0]), chosen[1]) if chosen else None
    step = Step(model, 0, 1, 0.5, Threat("linf", 8 / 255), torch.Generator().manual_seed(0), 0.01)
    hooked = [(defense, step)] if defense is not None else []

    def run() -> None:
        train_step(model, replace(batch), hooked, optimizer, precision=precision)

    return run


def seconds(name: str, precision: torch.dtype | None, rounds: int, without: tuple[str, ...] = ()) -> dict[str, float]:
    """Return the CPU seconds of a standard step and of each defense's, each its quickest in so many rounds.

    Fewer of them, but three, where more would change nothing.
    """
    steps = {label: step_of(name, chosen, precision) for label, chosen in DEFENSES.items() if label not in without}
    return quickest(steps, fewest=3, most=rounds, repeats=REPEATS)


def folding(name: str, precision: torch.dtype | None, rounds: int) -> float:
    """Return the CPU seconds of ten inner steps with batch norms folded over those without, the quickest of each."""
    model, batch = model_of(name)
    score, threat = cross_entropy_score(batch.y), Threat("linf", 8 / 255)

    def search(fold: bool) -> Tensor:
        return ascend(FrozenModel(model, fold=fold), score, batch.x, batch.x, threat, steps=10, alpha=2 / 255)

    with attack_mode(model), autocast("cpu", precision):
        found = quickest({"folded": lambda: search(True), "not": lambda: search(False)}, fewest=rounds, most=rounds)
    return found["folded"] / found["not"]


def print_steps(rounds: int) -> None:
    """Print a table of both models, in bfloat16 too where the processor multiplies in it."""
    precisions: list[torch.dtype | None] = [None, *([torch.bfloat16] if has_bf16(CPU) else [])]
    columns = [(name, one) for name in MODELS for one in precisions]
    measured = {column: seconds(*column, rounds) for column in columns}
    rows = {
        label: [found[label] / found["standard"] for found in measured.values()]
        for label in DEFENSES
        if label != "standard"
    }
    rows["*a standard step, over one in fp32*"] = [
        measured[name, one]["standard"] / measured[name, None]["standard"] for name, one in columns
    ]
    rows["*ten inner steps with batch norms folded, over the same without*"] = [
        folding(*column, rounds) for column in columns
    ]
    heads = [f"{name}, batch {MODELS[name][1]}{', bf16' if one else ''}" for name, one in columns]
    print("| step of | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    for label, values in rows.items():
        print(f"| {label} | " + " | ".join(f"{one:.2f}" for one in values) + " |")
