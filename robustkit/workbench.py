"""What the steps of one run share: its data, the model in use, the store, the device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from robustkit import registry
from robustkit.attacks.engine import Allowed
from robustkit.attacks.threat import Threat
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, Split, fixed_subset
from robustkit.errors import UsageError
from robustkit.models.artefact import load_model
from robustkit.recipe.plan import Plan
from robustkit.recipe.spec import Recipe, ThreatSpec, Use
from robustkit.store import MODEL, Store

if TYPE_CHECKING:
    from robustkit.pipeline import Events


class Workbench:
    """Keeps the data and the model in use between the steps of one plan."""

    def __init__(self, plan: Plan, store: Store, events: Events) -> None:
        self.plan = plan
        self.store = store
        self.events = events
        self.device = choose_device(plan.recipe.device)
        self.failed: set[str] = set()
        """Keys of steps that failed in this run, with those that needed them."""
        self._datasets: dict[float, Dataset] = {}
        self._test: Split | None = None
        self._model: tuple[str, nn.Module] | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the plan."""
        return self.plan.recipe

    @property
    def allowed(self) -> Allowed:
        """How attacks may run the models."""
        return Allowed(self.recipe.evaluate.precision, self.recipe.evaluate.compile)

    def dataset(self, validation: float) -> Dataset:
        """Return the data with this share of the training data cut off for validation; loaded once."""
        if validation not in self._datasets:
            self.events("data", {"message": f"loading {self.recipe.data.name}"})
            self._datasets[validation] = load_dataset(
                self.recipe.data,
                validation=validation,
                poison=self.recipe.poison,
                folder=self.recipe.folder,
                plugins=self.recipe.plugins,
            )
        return self._datasets[validation]

    def any_dataset(self) -> Dataset:
        """Return the data, whatever its validation share: for the test split and the shape."""
        if self._datasets:
            return next(iter(self._datasets.values()))
        trains = [variant.train for variant in self.recipe.variants if variant.train]
        return self.dataset(trains[0].validation if trains else 0.1)

    def test(self) -> Split:
        """Return the examples that every variant is measured on: a fixed random subset of the test split."""
        if self._test is None:
            self._test = fixed_subset(self.any_dataset().test, self.recipe.evaluate.examples).to(self.device)
        return self._test

    def model(self, key: str) -> nn.Module:
        """Return the stored model of a fit step, in eval mode on the device."""
        if self._model is None or self._model[0] != key:
            self._model = (key, self.load(key))
        return self._model[1]

    def load(self, key: str, name: str = MODEL, *, wrapped: bool = True) -> nn.Module:
        """Return a fresh copy of a stored model of a fit step, in eval mode on the device; wrapped as deployed."""
        path = self.artefact(key) if name == MODEL else self.store.step(key) / name
        model = load_model(
            path, folder=self.recipe.folder, plugins=self.recipe.plugins, trust_plugins=True, wrapped=wrapped
        )
        return model.to(self.device).eval()

    def artefact(self, key: str) -> Path:
        """Return the file of a fit step's model."""
        return self.store.step(key) / self.store.model_name(key)

    def create(self, kind: registry.Kind, use: Use) -> object:
        """Return the plugin that a use in the recipe asks for."""
        entry = registry.find(kind, use.name, folder=self.recipe.folder, plugins=self.recipe.plugins)
        return registry.create(entry, use.parameters)

    def warn(self, message: str) -> None:
        """Tell the person at the terminal."""
        self.events("warning", {"message": message})

    def progress(self, done: int, total: int) -> None:
        """Say how far a step is."""
        self.events("step", {"step": done, "steps": total})

    def attacked(self, done: int, total: int, robust: int) -> None:
        """Say how far an attack is, and how many of the attacked examples withstand it."""
        self.events("step", {"step": done, "steps": total, "robust": robust})


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; `auto` is CUDA where it is there, else the CPU.

    Raises:
        UsageError: torch has no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    mps = int(torch.backends.mps.is_available())
    count = {"cuda": torch.cuda.device_count(), "mps": mps}.get(device.type, 1)
    if (device.index or 0) >= count:
        there = f"it sees {count} of this kind" if count else f"it sees no {device.type} device"
        raise UsageError(
            f"device: {name} is not there for torch on this machine ({there}; `robustkit env` shows what it sees); "
            "use `device: auto`, or add device=cpu to the command"
        )
    return device


def threat_of(spec: ThreatSpec) -> Threat:
    """Return the threat of a recipe."""
    return Threat(spec.norm, spec.eps)
