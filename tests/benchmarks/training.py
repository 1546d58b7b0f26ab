"""How long training takes: to a clean or a robust accuracy beside other loops, and for one step of each defense.

    python tests/benchmarks/training.py clean --cifar ~/cifar10
    python tests/benchmarks/training.py robust --fashion /usr/share/datasets/fashion-mnist
    python tests/benchmarks/training.py steps
    python tests/benchmarks/training.py memory --cifar ~/cifar10

`robust` compares with ART too where it is installed: pip install adversarial-robustness-toolbox.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from racing import Rival, Side, race, table
from rivals import EPS, art_epoch, art_is_there, pgd_epoch, plain_epoch
from step_costs import print_steps
from torch import nn

from robustkit import registry
from robustkit.attacks.cascade import Cascade
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.threat import Attack, Threat
from robustkit.data.augment import Crop, Flip
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, fixed_subset, split_of
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.models.build import build_model
from robustkit.recipe.schema import load_recipe
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.train.loop import fit
from robustkit.train.state import Weights
from robustkit.train.validate import clean_loss_and_accuracy

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"
CLEAN_TARGET = 0.75
EXAMPLES = 1000
SLACK = 0.02
"""The robust target is what the plain loop reaches after its whole training, less so much."""


def use(name: str, **parameters: Any) -> Use:
    """Return a use of a plugin, as in a recipe."""
    return Use(name=name, parameters=parameters, label=name)


def network(data: Dataset, **parameters: Any) -> nn.Module:
    """Return a small_cnn, each with the same first weights."""
    torch.manual_seed(0)
    given = use("small_cnn", **parameters)
    return build_model(given, shape=data.shape, classes=10, mean=data.mean, std=data.std)


def trained(
    model: nn.Module,
    data: Dataset,
    spec: TrainSpec,
    defenses: Mapping[str, dict[str, Any]],
    threat: Threat,
    augment: Any,
) -> Callable[[Any], object]:
    """Return robustkit's training, which tells a listener of each epoch; everything it does is in its time."""

    def run(listener: Any) -> object:
        made = [(name, registry.create(registry.find("defense", name), given)) for name, given in defenses.items()]
        return fit(
            model,
            data,
            spec,
            made,
            threat=threat,
            seed=0,
            key="benchmark",
            device=CPU,
            on_event=listener,
            augment=augment,
        )

    return run


def whole(root: Path) -> Dataset:
    """Return CIFAR-10 with all 50,000 images to train on; 500 of them stand for a validation split too."""
    data = load_dataset(use("image_folder", root=str(root)), validation=0.01)
    images = torch.cat([data.train.images, data.validation.images])
    return replace(data, train=split_of(images, torch.cat([data.train.labels, data.validation.labels])))


def clean(given: argparse.Namespace) -> None:
    """Time to 75 % clean accuracy on CIFAR-10."""
    data = whole(given.cifar)
    spec = TrainSpec(
        epochs=given.epochs or 4,
        batch_size=256,
        optimizer=use("sgd", lr=0.2, momentum=0.9, weight_decay=5e-4),
        select="last",
    )
    mine, theirs = (network(data, widths=[32, 64, 64]) for _ in range(2))
    ours = Side("robustkit", mine)
    plain = Rival("plain loop", theirs, epoch=plain_epoch(theirs, data.train, 256))

    def measure(one: nn.Module) -> float:
        return clean_loss_and_accuracy(one, data.test, CPU)[1]

    train = trained(mine, data, spec, {}, Threat("linf", 8 / 255), [Crop(2), Flip(alternate=True)])
    race(ours, train, [plain], measure, target=CLEAN_TARGET, give_up=given.give_up)
    table(ours, [plain], CLEAN_TARGET)


class Judge:
    """Worst-case accuracy under PGD-20 and cascade on 1,000 test examples; an example that either fools is lost."""

    def __init__(self, data: Dataset, threat: Threat) -> None:
        test = fixed_subset(data.test, EXAMPLES)
        self.x, self.y, self.threat = test.floats(0, EXAMPLES), test.labels, threat

    def _correct(self, model: nn.Module, attack: Attack) -> NDArray[np.bool_]:
        clean_one = clean_outcome(model.eval(), self.x, self.y, batch_size=250, device=CPU)
        return attack_outcome(
            model,
            self.x,
            self.y,
            attack,
            self.threat,
            clean=clean_one,
            seed=0,
            label="benchmark",
            batch_size=250,
            device=CPU,
        ).correct

    def __call__(self, model: nn.Module, enough: float | None = None) -> float:
        """Return the accuracy; what PGD alone leaves standing, which is no less, where that is not `enough`."""
        standing = self._correct(model, Pgd(steps=20))
        if enough is not None and standing.mean() < enough:
            return float(standing.mean())
        return float((standing & self._correct(model, Cascade())).mean())


def judged(side: Side, kept: list[Weights], judge: Judge, target: float) -> None:
    """Put worst-case accuracies in the place of what was measured while the side trained, up to the target."""
    print(f"{side.name}: worst-case accuracy (where PGD-20 alone is under the target: under that)", end=":")
    met = False
    for number, weights in enumerate(kept):
        last = number == len(kept) - 1
        if met and not last:
            side.found[number] = (*side.found[number][:2], float("nan"))
            continue
        side.model.load_state_dict(weights)
        accuracy = judge(side.model, None if last else target)
        met = met or accuracy >= target
        side.found[number] = (*side.found[number][:2], accuracy)
        print(f" {number + 1}: {100 * accuracy:.1f}", end="", flush=True)
    print()


def robust(given: argparse.Namespace) -> None:
    """Time to a worst-case accuracy on Fashion-MNIST, eps 0.1: what plain PGD-10 reaches in the end, less 2 points."""
    source = use("fashion_mnist", root=str(given.fashion), limit=given.images)
    data = load_dataset(source, validation=0.05)
    threat = Threat("linf", EPS)
    names = ["robustkit", "plain PGD-10", *(["ART"] if art_is_there() else [])]
    if not art_is_there():
        print("not installed, so not compared: adversarial-robustness-toolbox")
    models = {name: network(data, widths=[16, 32, 32]) for name in names}
    kept: dict[str, list[Weights]] = {name: [] for name in names}

    def keep(one: nn.Module) -> float:
        name = next(label for label, model in models.items() if model is one)
        kept[name].append({key: value.detach().clone() for key, value in one.state_dict().items()})
        return clean_loss_and_accuracy(one, data.test, CPU)[1]

    ours = Side("robustkit", models["robustkit"])
    rivals = [
        Rival(name, models[name], epoch=make(models[name], data.train, 128), epochs=epochs)
        for name, make, epochs in (
            ("plain PGD-10", pgd_epoch, given.rival_epochs),
            ("ART", art_epoch, given.art_epochs or given.rival_epochs),
        )
        if name in models
    ]
    spec = TrainSpec(
        epochs=given.epochs or 6,
        batch_size=128,
        optimizer=use("sgd", lr=0.1, momentum=0.9, weight_decay=5e-4),
        select="last",
    )
    print("(while they train: clean accuracy)")
    train = trained(models["robustkit"], data, spec, {"n_fgsm": {}}, threat, [])
    race(ours, train, rivals, keep, target=None, give_up=given.give_up)
    judge = Judge(data, threat)
    target = judge(rivals[0].model) - SLACK
    print(
        f"target: {100 * target:.1f} %, what plain PGD-10 reached in the end less {100 * SLACK:.0f} points", flush=True
    )
    for side in (ours, *rivals):
        judged(side, kept[side.name], judge, target)
    table(ours, list(rivals), target)


def memory(given: argparse.Namespace) -> None:
    """Peak resident memory of an adversarial epoch of recipes/cifar10-defenses.yaml, in a process of its own."""
    command = [sys.executable, __file__, "memory-child", "--cifar", str(given.cifar), "--threads", str(given.threads)]
    subprocess.run(command, check=True)


def memory_child(given: argparse.Namespace) -> None:
    """Train the recipe's n-fgsm for an epoch on all of CIFAR-10, and print the process's peak."""
    recipe = load_recipe(RECIPES / "cifar10-defenses.yaml", ("train.epochs=1",))
    variant = recipe.variant("n-fgsm")
    assert variant.train is not None
    data = load_dataset(use("image_folder", root=str(given.cifar)), validation=variant.train.validation)
    model = build_model(variant.model, shape=data.shape, classes=10, mean=data.mean, std=data.std)
    threat = Threat(variant.threat.norm, variant.threat.eps)
    defenses = {one.name: one.parameters for one in variant.defenses}
    augment = [
        registry.create(registry.find("augmentation", one.name), one.parameters) for one in variant.train.augment
    ]
    trained(model, data, variant.train, defenses, threat, augment)(lambda *_: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak resident memory of training n-fgsm for an epoch on {len(data.train):,} images: {peak:,.0f} MiB")


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["clean", "robust", "steps", "memory", "memory-child"])
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images, train/<class>/* and test/<class>/*")
    parser.add_argument("--fashion", type=Path, help="folder of the four IDX files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=20_000, help="Fashion-MNIST images to train on")
    parser.add_argument("--epochs", type=int, help="of robustkit's training")
    parser.add_argument("--rival-epochs", type=int, default=6, help="of the adversarial trainings beside it")
    parser.add_argument("--art-epochs", type=int, help="of ART's training, where it is to end earlier")
    parser.add_argument(
        "--give-up", type=float, default=5.0, help="stop the plain loop after so many times our seconds"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.table in ("clean", "memory", "memory-child") and given.cifar is None:
        parser.error("--cifar is missing")
    if given.table == "robust" and given.fashion is None:
        parser.error("--fashion is missing")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"{given.threads} thread(s), torch {torch.__version__}\n", flush=True)
    if given.table == "steps":
        print_steps(given.rounds)
    else:
        {"clean": clean, "robust": robust, "memory": memory, "memory-child": memory_child}[given.table](given)


if __name__ == "__main__":
    main()
