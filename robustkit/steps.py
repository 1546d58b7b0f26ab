"""How each kind of step is done: fit, measure, clean, attack, curve, checks, latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks.gradient import Pgd
from robustkit.attacks.noise import Noise
from robustkit.attacks.threat import Attack, Threat
from robustkit.checkpoint import StateFile
from robustkit.compress.costs import measure_costs, measure_latency, notes_of
from robustkit.compress.keeper import MaskKeeper
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, Split
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.checks import preflight
from robustkit.evaluation.curve import security_curve
from robustkit.evaluation.outcome import Outcome
from robustkit.models.artefact import load_model, save_model
from robustkit.models.build import build_model
from robustkit.recipe.plan import Plan, Step, content_key
from robustkit.recipe.spec import Recipe, ThreatSpec, Use, VariantSpec
from robustkit.seeding import derive_seed
from robustkit.store import STATE, Store
from robustkit.train.hooks import Defense
from robustkit.train.loop import fit

if TYPE_CHECKING:
    from robustkit.pipeline import Events

MODEL = "model.safetensors"
LAST = "last.safetensors"
OUTCOME = "outcome.npz"
GALLERY = "gallery.npz"
CURVE_STEPS = 10
CURVE_TRIES = 4
SUBSET_SEED = 20_190_220
"""Fixed, so that every run of every recipe attacks the same test examples."""


class Workbench:
    """Executes steps of one plan; keeps the data and the model in use between them."""

    def __init__(self, plan: Plan, store: Store, events: Events) -> None:
        self.plan = plan
        self.store = store
        self.events = events
        self.device = choose_device(plan.recipe.device)
        self._datasets: dict[float, Dataset] = {}
        self._test: Split | None = None
        self._model: tuple[str, nn.Module] | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the plan."""
        return self.plan.recipe

    def run(self, step: Step, *, skip: set[str]) -> None:
        """Do one step and mark it as done. `skip`: keys of failed steps, which a latency comparison leaves out."""
        if step.kind == "latency":
            self._latency(step, skip)
        elif step.kind == "fit":
            self._fit(step)
        elif step.kind == "measure":
            self._measure(step)
        elif step.kind == "clean":
            self._clean(step)
        elif step.kind == "attack":
            self._attack(step)
        elif step.kind == "curve":
            self._curve(step)
        else:
            self._checks(step)

    def dataset(self, validation: float) -> Dataset:
        """Return the data with this share of the training data cut off for validation; loaded once."""
        if validation not in self._datasets:
            self.events("data", {"message": f"loading {self.recipe.data.name}"})
            self._datasets[validation] = load_dataset(
                self.recipe.data, validation=validation, folder=self.recipe.folder
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
            split = self.any_dataset().test
            order = np.random.default_rng(SUBSET_SEED).permutation(len(split))
            count = min(self.recipe.evaluate.examples or len(split), len(split))
            self._test = split.select(torch.from_numpy(order[:count].copy())).to(self.device)
        return self._test

    def model(self, key: str) -> nn.Module:
        """Return the stored model of a fit step, in eval mode on the device."""
        if self._model is None or self._model[0] != key:
            self._model = (key, self._load(key))
        return self._model[1]

    def _load(self, key: str) -> nn.Module:
        path = self.store.step(key) / MODEL
        model = load_model(path, folder=self.recipe.folder, trust_plugins=True)
        return model.to(self.device).eval()

    def _create(self, kind: registry.Kind, use: Use) -> object:
        entry = registry.find(kind, use.name, folder=self.recipe.folder, plugins=self.recipe.plugins)
        return registry.create(entry, use.parameters)

    def _fit(self, step: Step) -> None:
        variant = self.recipe.variant(step.variant)
        data = self.dataset(variant.train.validation) if variant.train else self.any_dataset()
        model = self._start(variant, step, data).to(self.device)
        keeper = self._keeper(variant, step, data)
        record: dict[str, Any] = {"variant": step.variant, "seed": step.seed}
        files: tuple[str, ...] = (MODEL,)
        if variant.train:
            defenses = self._defenses(variant, keeper)
            fitted = fit(
                model,
                data,
                variant.train,
                defenses,
                threat=threat_of(variant.threat),
                seed=step.seed,
                key=step.key,
                device=self.device,
                on_event=self.events,
                checkpoint=StateFile(self.store.step(step.key) / STATE, self._warn),
                augment=[self._create("augmentation", use) for use in variant.train.augment],  # type: ignore[misc]
            )
            model = fitted.model
            record |= {
                "best_epoch": fitted.best_epoch,
                "epochs": [row.model_dump() for row in fitted.epochs],
                "flags": [flag.model_dump() for flag in fitted.flags],
                "notes": list(fitted.notes),
                "train_seconds": fitted.seconds,
            }
            last = self._start(variant, step, data)
            last.load_state_dict(fitted.last_state)
            self._save(last, variant, data, step, LAST)
            files = (MODEL, LAST)
        elif keeper is not None:
            model = keeper.compress(model)
        if keeper is not None:
            model = keeper.finish(model)
        self._save(model, variant, data, step, MODEL)
        self.store.finish(step.key, record, files)

    def _save(self, model: nn.Module, variant: VariantSpec, data: Dataset, step: Step, name: str) -> None:
        folder = self.store.step(step.key)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, folder / name, variant.model, shape=data.shape, classes=data.classes)

    def _start(self, variant: VariantSpec, step: Step, data: Dataset) -> nn.Module:
        if step.parents:
            return self._load(step.parents[0])
        with torch.random.fork_rng():
            # Variants of one architecture start from the same weights, so that differences come from the defenses.
            identity = content_key(model=variant.model.name, parameters=variant.model.parameters)
            torch.manual_seed(derive_seed(step.seed, "init", identity))
            given = self.recipe.normalize
            return build_model(
                variant.model,
                shape=data.shape,
                classes=len(data.classes),
                mean=given.mean if given else data.mean,
                std=given.std if given else data.std,
                folder=self.recipe.folder,
                plugins=self.recipe.plugins,
            )

    def _keeper(self, variant: VariantSpec, step: Step, data: Dataset) -> MaskKeeper | None:
        inherit = self._compressed(variant.parent)
        if not variant.compress and not inherit:
            return None
        return MaskKeeper(
            [self._create("compressor", use) for use in variant.compress],
            inherit=inherit,
            context_seed=derive_seed(step.seed, step.key, "compress"),
            example=torch.zeros(2, *data.shape),
            threat=threat_of(variant.threat),
        )

    def _compressed(self, label: str | None) -> bool:
        """Say whether a variant or one that it descends from is compressed: then its zeros are inherited."""
        while label is not None:
            variant = self.recipe.variant(label)
            if variant.compress:
                return True
            label = variant.parent
        return False

    def _defenses(self, variant: VariantSpec, keeper: MaskKeeper | None) -> list[tuple[str, Defense]]:
        named: list[tuple[str, Defense]] = []
        seen: dict[str, int] = {}
        for use in variant.defenses:
            seen[use.name] = seen.get(use.name, 0) + 1
            defense = self._create("defense", use)
            assert isinstance(defense, Defense)
            # The number of the use, not its label: renaming must not shift any random number.
            named.append((f"{use.name}#{seen[use.name]}", defense))
        if keeper is not None:
            named.append(("masks", keeper))
        return named

    def _measure(self, step: Step) -> None:
        (fit_key,) = step.parents
        costs = measure_costs(self.model(fit_key), self.any_dataset().shape, self.store.step(fit_key) / MODEL)
        values = asdict(costs)
        values["layers"] = [layer.model_dump() for layer in costs.layers]
        values["notes"] = notes_of(costs)
        values["classes"] = list(self.any_dataset().classes)
        self.store.finish(step.key, values)

    def _clean(self, step: Step) -> None:
        test = self.test()
        outcome = clean_outcome(
            self.model(step.parents[0]),
            test.images,
            test.labels,
            batch_size=self.recipe.evaluate.batch_size,
            device=self.device,
        )
        self._finish_outcome(step, outcome)

    def _attack(self, step: Step) -> None:
        assert step.use is not None
        model, test = self.model(step.parents[0]), self.test()
        attack = self._create("attack", step.use)
        outcome = attack_outcome(
            model,
            test.images,
            test.labels,
            attack,  # type: ignore[arg-type]
            threat_of(self.recipe.threat),
            clean=self.read_outcome(step.parents[1]),
            seed=derive_seed(step.seed, step.key, "attack"),
            label=step.use.name,
            batch_size=self.recipe.evaluate.batch_size,
            device=self.device,
            keep=self.recipe.evaluate.gallery,
            on_progress=self._progress,
        )
        files: tuple[str, ...] = (OUTCOME,)
        if outcome.adversarial is not None and len(outcome.adversarial):
            self._write_gallery(step, model, outcome.adversarial)
            files = (OUTCOME, GALLERY)
        notes = [str(note) for note in getattr(attack, "notes", ())]
        expected = bool(getattr(attack, "minimum_norm", False))
        self._finish_outcome(step, outcome, {"notes": notes, "minimum_norm": expected}, files)

    def _write_gallery(self, step: Step, model: nn.Module, adversarial: Tensor) -> None:
        count = len(adversarial)
        clean = self.test().images[:count]
        with torch.no_grad():
            before = model(clean.to(torch.float32) / 255).float().softmax(1)
            after = model(adversarial.to(self.device)).float().softmax(1)
        arrays = {
            "clean": clean,
            "adversarial": adversarial.float(),
            "label": self.test().labels[:count],
            "prediction_clean": before.argmax(1),
            "prediction_adversarial": after.argmax(1),
            "confidence_clean": before.amax(1),
            "confidence_adversarial": after.amax(1),
        }
        self.store.write_arrays(step.key, GALLERY, {name: value.cpu().numpy() for name, value in arrays.items()})

    def _finish_outcome(
        self,
        step: Step,
        outcome: Outcome,
        extra: Mapping[str, Any] | None = None,
        files: tuple[str, ...] = (OUTCOME,),
    ) -> None:
        arrays = {
            "correct": outcome.correct,
            "prediction": outcome.prediction,
            "distance": outcome.distance,
            "labels": self.test().labels.cpu().numpy(),
        }
        self.store.write_arrays(step.key, OUTCOME, arrays)
        record = {
            "forwards": outcome.forwards,
            "backwards": outcome.backwards,
            "seconds": outcome.seconds,
            "projected": outcome.projected,
            **(extra or {}),
        }
        self.store.finish(step.key, record, files)

    def read_outcome(self, key: str) -> Outcome:
        """Return the stored outcome of a clean or an attack step."""
        record = self.store.record(key) or {}
        arrays = self.store.read_arrays(key, OUTCOME)
        return Outcome(
            correct=arrays["correct"],
            prediction=arrays["prediction"],
            distance=arrays["distance"],
            forwards=int(record.get("forwards", 0)),
            backwards=int(record.get("backwards", 0)),
            seconds=float(record.get("seconds", 0.0)),
            projected=int(record.get("projected", 0)),
        )

    def _curve(self, step: Step) -> None:
        recipe, test = self.recipe, self.test()
        model, clean = self.model(step.parents[0]), self.read_outcome(step.parents[1])
        attacks: dict[str, Attack] = {"pgd": Pgd(steps=CURVE_STEPS), "noise": Noise(tries=CURVE_TRIES)}
        correct = {
            name: security_curve(
                model,
                test.images,
                test.labels,
                attack,
                recipe.threat.norm,
                recipe.evaluate.eps_curve,
                clean=clean,
                seed=derive_seed(step.seed, step.key, name),
                batch_size=recipe.evaluate.batch_size,
                device=self.device,
            )
            for name, attack in attacks.items()
        }
        record = {"eps": list(recipe.evaluate.eps_curve), "correct": correct, "n": len(test)}
        self.store.finish(step.key, record)

    def _checks(self, step: Step) -> None:
        test = self.test()
        flags = preflight(
            self.model(step.parents[0]),
            test.images,
            test.labels,
            threat_of(self.recipe.threat),
            seed=derive_seed(step.seed, step.key),
            device=self.device,
        )
        self.store.finish(step.key, {"flags": [flag.model_dump() for flag in flags]})

    def _latency(self, step: Step, skip: set[str]) -> None:
        keys = [key for key in dict.fromkeys(step.parents) if key not in skip]
        models = {key: self._load(key) for key in keys}
        measured = measure_latency(models, self.any_dataset().shape, self.device) if models else {}
        latency = {
            key: {batch: value.model_dump() for batch, value in found.items()} for key, found in measured.items()
        }
        self.store.finish(step.key, {"latency": latency})

    def _warn(self, message: str) -> None:
        self.events("warning", {"message": message})

    def _progress(self, done: int, total: int) -> None:
        self.events("step", {"step": done, "steps": total})


def choose_device(name: str) -> torch.device:
    """Return the device that a recipe names; `auto` is CUDA where it is there, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def threat_of(spec: ThreatSpec) -> Threat:
    """Return the threat of a recipe."""
    return Threat(spec.norm, spec.eps)
