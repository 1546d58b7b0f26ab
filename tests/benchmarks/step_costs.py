"""What a training step of each defense costs in standard steps, on the processor's own clock, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.models.build import build_model
from robustkit.recipe.spec import Use
from robustkit.train.hooks import Batch, Step
from robustkit.train.layout import to_channels_last
from robustkit.train.optim import Sgd
from robustkit.train.step import train_step

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


def step_of(name: str, chosen: tuple[str, dict[str, Any]] | None) -> Callable[[], None]:
    """Return one training step of a defense (None: of no defense) on a batch that does not change."""
    use, count = MODELS[name]
    torch.manual_seed(0)
    built = build_model(use, shape=SHAPE, classes=10, mean=[0.5] * 3, std=[0.25] * 3)
    model, layout = to_channels_last(built, SHAPE, CPU)
    model.train()
    optimizer = Sgd(lr=1e-3).build([{"params": list(model.parameters())}])
    x = torch.rand(count, *SHAPE).contiguous(memory_format=layout)
    y = torch.randint(10, (count,))
    defense = registry.create(registry.find("defense", chosen[0]), chosen[1]) if chosen else None
    step = Step(model, 0, 1, 0.5, Threat("linf", 8 / 255), torch.Generator().manual_seed(0), 0.01)
    hooked = [(defense, step)] if defense is not None else []

    def run() -> None:
        train_step(model, Batch(x, y, y, 10), hooked, optimizer, precision=None)

    return run


def costs(name: str, rounds: int, without: tuple[str, ...] = ()) -> dict[str, float]:
    """Return the CPU seconds of each defense's step over those of a standard one, of each the quickest of the rounds.

    In turns. What else a machine does only makes a step slower, so the quickest is the one that is least disturbed.
    """
    steps = {label: step_of(name, chosen) for label, chosen in DEFENSES.items() if label not in without}
    found: dict[str, list[float]] = {label: [] for label in steps}
    for number in range(rounds + 1):
        for label, run in steps.items():
            repeats = 4 if label == "standard" else 2 if label == "n_fgsm" else 1
            begun = time.process_time()
            for _ in range(repeats):
                run()
            if number:
                found[label].append((time.process_time() - begun) / repeats)
    standard = min(found.pop("standard"))
    return {label: min(times) / standard for label, times in found.items()}


def print_steps(rounds: int) -> None:
    """Print a table of both models."""
    tables = {name: costs(name, rounds) for name in MODELS}
    print("| step of | " + " | ".join(f"{name}, batch {MODELS[name][1]}" for name in tables) + " |")
    print("|---|" + "---|" * len(tables))
    for label in next(iter(tables.values())):
        print(f"| {label} | " + " | ".join(f"{one[label]:.2f}" for one in tables.values()) + " |")
