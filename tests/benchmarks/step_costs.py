"""What a training step of each defense costs in standard steps, on the processor's own clock, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.defenses.frozen import FrozenModel
from robustkit.defenses.inner import ascend, cross_entropy_score
from robustkit.models.build import build_model
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


def step_of(name: str, chosen: tuple[str, dict[str, Any]] | None) -> Callable[[], None]:
    """Return one training step of a defense (None: of no defense) on a batch that does not change."""
    model, batch = model_of(name)
    optimizer = Sgd(lr=1e-3).build([{"params": list(model.parameters())}])
    defense = registry.create(registry.find("defense", chosen[0]), chosen[1]) if chosen else None
    step = Step(model, 0, 1, 0.5, Threat("linf", 8 / 255), torch.Generator().manual_seed(0), 0.01)
    hooked = [(defense, step)] if defense is not None else []

    def run() -> None:
        train_step(model, replace(batch), hooked, optimizer, precision=None)

    return run


def costs(name: str, rounds: int, enough: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the CPU seconds of each defense's step over those of a standard one, of each the quickest of the rounds.

    In turns. What else a machine does only makes a step slower, so the quickest is the one that is least disturbed, and
    more rounds come closer to an idle machine's. enough: of these defenses alone, and after two rounds no more of them
    than it takes until each costs so little.
    """
    wanted = [label for label in DEFENSES if enough is None or label in enough]
    steps = {label: step_of(name, DEFENSES[label]) for label in dict.fromkeys(["standard", *wanted])}
    least = dict.fromkeys(steps, float("inf"))
    found: dict[str, float] = {}
    for number in range(rounds + 1):
        for label, run in steps.items():
            repeats = REPEATS.get(label, 1) if number else 1
            begun = time.process_time()
            for _ in range(repeats):
                run()
            if number:
                least[label] = min(least[label], (time.process_time() - begun) / repeats)
        found = {label: seconds / least["standard"] for label, seconds in least.items() if label != "standard"}
        if number >= 2 and enough is not None and all(found[label] <= most for label, most in enough.items()):
            break
    return found


def folding(name: str, rounds: int) -> float:
    """Return the CPU seconds of ten inner steps with batch norms folded over those without, the quickest of each."""
    model, batch = model_of(name)
    score, threat = cross_entropy_score(batch.y), Threat("linf", 8 / 255)
    found: dict[bool, list[float]] = {True: [], False: []}
    with attack_mode(model):
        for number in range(2 * rounds):
            fold = number % 2 == 0
            begun = time.process_time()
            ascend(FrozenModel(model, fold=fold), score, batch.x, batch.x, threat, steps=10, alpha=2 / 255)
            found[fold].append(time.process_time() - begun)
    return min(found[True]) / min(found[False])


def print_steps(rounds: int) -> None:
    """Print a table of both models."""
    tables = {name: costs(name, rounds) for name in MODELS}
    print("| step of | " + " | ".join(f"{name}, batch {MODELS[name][1]}" for name in tables) + " |")
    print("|---|" + "---|" * len(tables))
    for label in next(iter(tables.values())):
        print(f"| {label} | " + " | ".join(f"{one[label]:.2f}" for one in tables.values()) + " |")
    cells = " | ".join(f"{folding(name, rounds):.2f}" for name in tables)
    print(f"| *ten inner steps with batch norms folded, over the same without* | {cells} |")
