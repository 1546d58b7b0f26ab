"""The training loop: one for every defense and every compression."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit import registry
from robustkit.attacks.threat import Threat
from robustkit.data.augment import Augmentation
from robustkit.data.batches import Sample, epoch_order, resident, training_batches
from robustkit.data.split import Dataset
from robustkit.errors import TrainingError, UsageError
from robustkit.recipe.spec import TrainSpec, Use
from robustkit.results import EpochRow, Flag
from robustkit.seeding import derive_seed
from robustkit.train.checkpointing import checkpointed, chosen_blocks
from robustkit.train.clock import Clock
from robustkit.train.determinism import deterministic
from robustkit.train.engine import TrainingEngine, choose
from robustkit.train.guards import Guards, Verdict
from robustkit.train.hooks import Batch, Decision, EpochReport, Step, evaluated_model, is_adversarial, owned_hooks
from robustkit.train.layout import to_channels_last
from robustkit.train.optim import OptimizerPlugin, SchedulePlugin
from robustkit.train.overfitting import overfitting_flags
from robustkit.train.pieces import check_pieces
from robustkit.train.prepare import prepare_data
from robustkit.train.recovery import Recovery
from robustkit.train.stages import (
    batch_size_at,
    check_stages,
    freeze,
    full_eps,
    resized,
    set_modes,
    stage_at,
    steps_from,
)
from robustkit.train.state import (
    Checkpoint,
    Named,
    TrainingState,
    Weights,
    from_file,
    restore,
    snapshot,
    to_file,
    weights_of,
)
from robustkit.train.step import train_step
from robustkit.train.switch import substitutes
from robustkit.train.validate import clean_loss_and_accuracy, robust_accuracy, robust_subset

OnEvent = Callable[[str, Mapping[str, Any]], None]
Create = Callable[[registry.Kind, Use], Any]
"""Makes the plugin of a kind that a use in a recipe asks for."""
CHECK_EVERY = 100
"""Steps between two looks at whether the loss is still finite: each look waits for the device."""
SHOW_EVERY = 0.25
"""Seconds between two events for a progress bar."""


def create_by_name(kind: registry.Kind, use: Use) -> Any:  # noqa: ANN401
    """Return a plugin by its name alone: built-in, from an entry point, registered, or `module:Class`."""
    return registry.create(registry.find(kind, use.name), use.parameters)


@dataclass
class Fitted:
    """A trained model: the best weights are in `model`, the last ones in `last_state`."""

    model: nn.Module
    last_state: Weights
    epochs: list[EpochRow]
    best_epoch: int
    flags: list[Flag]
    notes: list[str]
    seconds: float
    poison: dict[str, Any] | None = None
    """Where it is known what is poisoned in the training data: what the defenses removed of it."""


def fit(
    model: nn.Module,
    data: Dataset,
    spec: TrainSpec,
    defenses: Named,
    *,
    threat: Threat,
    seed: int,
    key: str,
    device: torch.device,
    on_event: OnEvent,
    checkpoint: Checkpoint | None = None,
    augment: Sequence[Augmentation] = (),
    create: Create = create_by_name,
    choices: Path | None = None,
) -> Fitted:
    """Train a model with its defenses and return it with its best weights.

    The best epoch is chosen on the validation split: by attacked accuracy where a defense trains on perturbed images
    or `select` asks for it, else by clean accuracy. The test split is never looked at. Every epoch starts from seeds
    derived from (seed, key, plugin, epoch), so a training that is resumed from `checkpoint` gives the numbers of an
    undisturbed one. `create` makes the optimizer and the schedule that the spec names. `choices`: a folder that keeps
    what `auto` chose, for the next training of the same model on the same machine.

    Raises:
        UsageError: a defense parts the data; each part needs a call of its own. Or options that exclude each other.
        TrainingError: the loss is not finite after three returns with half the learning rate.
    """
    if any("partition" in owned_hooks(type(defense)) for _, defense in defenses):
        raise UsageError("a defense that parts the data trains several models; a recipe runs it, `fit` trains one")
    with deterministic(spec.deterministic, device):
        run = _Run(model, data, spec, defenses, threat, seed, key, device, on_event, augment, create, choices)
        return run.fit(checkpoint)


class _Run:
    """One training. The methods follow the order in which things happen."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        spec: TrainSpec,
        defenses: Named,
        threat: Threat,
        seed: int,
        key: str,
        device: torch.device,
        on_event: OnEvent,
        augment: Sequence[Augmentation],
        create: Create = create_by_name,
        choices: Path | None = None,
    ) -> None:
        check_pieces(spec.accumulate, defenses)
        self.choices = choices
        self.spec, self.defenses, self.threat = spec, defenses, threat
        self.seed, self.key, self.device = seed, key, device
        self.on_event, self.augment = on_event, augment
        self.classes = len(data.classes)
        self.adversarial = any(is_adversarial(defense) for _, defense in defenses)
        self.ladder = substitutes(defenses, threat.norm)
        self.notes: list[str] = []
        prepared = prepare_data(data, defenses, seed=seed, key=key, device=device, log=self._log)
        self.train, self.weights = resident(prepared.train, device, spec.memory_limit), prepared.weights
        self.poison = prepared.poison
        self.validation = data.validation.to(device)
        self.attacked = robust_subset(self.validation)
        # Shown where it is asked for; no decision ever reads it.
        self.test = data.test.to(device) if spec.monitor_test else None
        self.model, self.layout = to_channels_last(self._prepare_model(model.to(device)), self.train.shape, device)
        check_stages(self.model, spec, self.train.shape, device)
        self.trained = frozenset(name for name, one in self.model.named_parameters() if one.requires_grad)
        self.optimizer = self._optimizer(create("optimizer", spec.optimizer))
        self.schedule: SchedulePlugin = create("schedule", spec.schedule)
        self.blocks = chosen_blocks(self.model, spec)
        self.engine = TrainingEngine()
        self.runner: Callable[[Tensor], Tensor] = self.model
        self.clock = Clock(spec.time_limit, 0.0, on_event)
        # Built once: hooks that were inserted must be there before a state is taken or put back.
        self.initial = snapshot(self.model, self.optimizer, self.defenses)

    def _log(self, message: str, numbers: Mapping[str, Any]) -> None:
        self.notes.append(message)
        self.on_event("data", {"message": message, **numbers})

    def _prepare_model(self, model: nn.Module) -> nn.Module:
        for _, defense in self.defenses:
            model = defense.prepare_model(model)
        return model

    def _optimizer(self, plugin: OptimizerPlugin) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        for _, defense in self.defenses:
            groups = defense.parameter_groups(groups, self.model)
        optimizer = plugin.build(groups)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        return optimizer

    def fit(self, checkpoint: Checkpoint | None) -> Fitted:
        """Train to the end, from where the checkpoint left off."""
        state = self._start(checkpoint)
        good = snapshot(self.model, self.optimizer, self.defenses)
        recovery = Recovery(self._put_back, self.initial, self.on_event, self.ladder)
        self.clock = Clock(self.spec.time_limit, state.seconds, self.on_event)
        while state.epoch < self.spec.epochs and not state.stopped:
            row = self._epoch(state)
            weights = weights_of(self._evaluated())
            verdict, state.stopped = self._judge(row, state)
            if verdict == "ok":
                self._accept(row, state, weights)
                good = snapshot(self.model, self.optimizer, self.defenses)
            else:
                state.stopped = recovery.recover(verdict, row, state, good)
                if verdict == "stuck" and state.stopped:
                    self._accept(row, state, weights)
                    state.guards.collapsed_at = row.epoch
                elif verdict == "stuck":
                    good = self.initial
            if checkpoint is not None:
                checkpoint.save(to_file(state, good))
        return self._finish(state)

    def _start(self, checkpoint: Checkpoint | None) -> TrainingState:
        guards = Guards(classes=self.classes, epochs=self.spec.epochs, adversarial=self.adversarial)
        saved = checkpoint.load() if checkpoint is not None else None
        if saved is None:
            state = TrainingState(guards=guards, notes=list(self.notes), engine=self._engine(None))
            note = state.engine.note() if state.engine else None
            state.notes += [note] if note else []
        else:
            restore(saved, self.model, self.optimizer, self.defenses)
            state = from_file(saved, guards)
            state.engine = self._engine(state.engine)
            self.on_event("resume", {"epoch": state.epoch, "epochs": self.spec.epochs})
        self.engine = state.engine or self.engine
        self.runner = self.engine.runner(self.model)
        return state

    def _engine(self, known: TrainingEngine | None) -> TrainingEngine:
        size = max(2, batch_size_at(self.spec, 0) // self.spec.accumulate)
        x = self.train.floats(0, size).to(self.device).contiguous(memory_format=self.layout)
        return known or choose(self.spec, self.model, x, self.device, self.choices, self.classes)

    def _put_back(self, saved: dict[str, Any]) -> None:
        restore(saved, self.model, self.optimizer, self.defenses)

    def _seed(self, label: str, state: TrainingState) -> int:
        return derive_seed(self.seed, self.key, label, state.epoch, state.guards.attempt)

    def _epoch(self, state: TrainingState) -> EpochRow:
        started = time.perf_counter()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed("torch", state))
            loss, accuracy = self._steps(state)
        row = self._measure(state, loss, accuracy)
        row.seconds = round(time.perf_counter() - started, 3)
        state.seconds += row.seconds
        return row

    def _steps(self, state: TrainingState) -> tuple[float, float]:
        order = epoch_order(len(self.train), torch.Generator().manual_seed(self._seed("order", state)), self.weights)
        generator = torch.Generator(device=self.device).manual_seed(self._seed("augment", state))
        own = {
            label: torch.Generator(device=self.device).manual_seed(self._seed(label, state))
            for label, _ in self.defenses
        }
        size = batch_size_at(self.spec, state.epoch)
        steps = -(-len(order) // size)
        later = steps_from(self.spec, state.epoch + 1, len(order))
        total = torch.zeros((), device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = number = 0
        shown = time.perf_counter()
        stage = stage_at(self.spec, state.epoch)
        freeze(self.model, stage.freeze, self.trained)
        set_modes(self.model, stage.freeze)
        batches = training_batches(
            self.train,
            order,
            size,
            self.device,
            self.augment,
            generator,
            memory_limit=self.spec.memory_limit,
            epoch=state.epoch,
            seed=derive_seed(self.seed, self.key, "augment"),
        )
        for number, sample in enumerate(batches, 1):
            loss, hits = self._step(state, sample, number, steps, own)
            y = sample[1]
            total += loss * len(y)
            right += hits
            seen += len(y)
            self._project(later + steps - number, total, state)
            if number % CHECK_EVERY == 0 and not bool(torch.isfinite(total)):
                break
            if time.perf_counter() - shown > SHOW_EVERY:
                shown = time.perf_counter()
                self.on_event("step", {"epoch": state.epoch, "step": number, "steps": steps})
        return float(total) / max(1, seen), int(right) / max(1, seen)

    def _step(
        self, state: TrainingState, sample: Sample, number: int, steps: int, own: dict[str, torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Train on the batch of this number (from 1) of an epoch of so many steps; `own`: each defense's generator."""
        x, y, index = sample
        progress = (state.epoch + (number - 1) / steps) / self.spec.epochs
        self._set_lr(progress, state)
        stage = stage_at(self.spec, state.epoch)
        ramp = state.guards.ramp(progress) * stage.eps
        x = resized(x, stage.resolution)
        at = (self.model, state.epoch, self.spec.epochs, progress, self.threat.scaled(ramp))
        length = 1 / (steps * self.spec.epochs)
        with checkpointed(self.model, self.blocks):
            return train_step(
                self.runner,
                Batch(x.contiguous(memory_format=self.layout), y, index, self.classes),
                [
                    (defense, Step(*at, own[label], length, ramp, label.partition("#")[0]))
                    for label, defense in self.defenses
                ],
                self.optimizer,
                precision=self.engine.precision,
                instead=self.ladder[state.guards.switches - 1].defense if state.guards.switches else None,
                audit=number == 1 and self.spec.guards,
                accumulate=self.spec.accumulate,
            )

    def _project(self, left: int, total: Tensor, state: TrainingState) -> None:
        """Count a step for the clock, and say so where the training will end too late."""
        late = self.clock.tick(left, total.item)
        if late is not None:
            state.notes.append(late)
            self.on_event("warning", {"message": late})

    def _set_lr(self, progress: float, state: TrainingState) -> None:
        factor = (
            self.schedule.factor(progress, state.epoch) * state.guards.lr_scale * stage_at(self.spec, state.epoch).lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def _measure(self, state: TrainingState, loss: float, accuracy: float) -> EpochRow:
        model = self._evaluated()
        found = None
        if self.adversarial or self.spec.select == "robust":
            seed = derive_seed(self.seed, self.key, "validation")
            found = robust_accuracy(model, self.attacked, self.threat, self.device, seed=seed)
        held_out, clean = clean_loss_and_accuracy(model, self.validation, self.device)
        row = EpochRow(
            epoch=state.epoch,
            loss=loss,
            train_accuracy=accuracy,
            validation_loss=held_out,
            clean=clean,
            robust=found.robust if found else None,
            single_step=found.single_step if found else None,
            margin=found.margin if found else None,
            lr=self.optimizer.param_groups[0]["lr"],
        )
        if self.test is not None:
            row.test_loss, row.test_accuracy = clean_loss_and_accuracy(model, self.test, self.device)
        return row

    def _evaluated(self) -> nn.Module:
        return evaluated_model(self.model, [defense for _, defense in self.defenses])

    def _judge(self, row: EpochRow, state: TrainingState) -> tuple[Verdict, bool]:
        """Return what the guards and the defenses make of an epoch, and whether it is to be the last one."""
        verdict: Verdict = state.guards.judge(row, state.rows) if self.spec.guards else "ok"
        if verdict != "ok":
            return verdict, False
        report = EpochReport(row.epoch, row.loss, row.train_accuracy, row.clean, row.robust, row.single_step)
        decisions = [defense.after_epoch(report) for _, defense in self.defenses]
        if Decision.FAIL in decisions:
            raise TrainingError(f"a defense gave up after epoch {row.epoch + 1}")
        if Decision.ROLLBACK in decisions:
            return "rolled-back", False
        return "ok", Decision.STOP in decisions

    def _accept(self, row: EpochRow, state: TrainingState, weights: Weights) -> None:
        progress = (state.epoch + 1) / self.spec.epochs
        step = Step(self.model, state.epoch, self.spec.epochs, progress, self.threat, torch.Generator())
        state.rows.append(row)
        state.epoch += 1
        state.last = weights
        whole = state.guards.ramp(progress) == 1 and full_eps(self.spec, row.epoch)
        if whole and all(defense.ready(step) for _, defense in self.defenses):
            score = self._score(row)
            if score >= state.best_score:
                state.best, state.best_epoch, state.best_score = state.last, row.epoch, score
        left = (self.spec.epochs - state.epoch) * state.seconds / max(1, len(state.rows))
        self.on_event("epoch", {**row.model_dump(), "epochs": self.spec.epochs, "eta": round(left, 1)})

    def _score(self, row: EpochRow) -> tuple[float, float]:
        select = self.spec.select
        if select == "last":
            return float(row.epoch), 0.0
        if select == "clean" or row.robust is None:
            return row.clean, 0.0
        return row.robust, -(row.margin or 0.0)

    def _plain(self, model: nn.Module, weights: Weights) -> nn.Module:
        """Return the model with these weights and without what the defenses put into it."""
        model.load_state_dict(weights)
        for _, defense in reversed(self.defenses):
            model = defense.restore_model(model)
        return model

    def _finish(self, state: TrainingState) -> Fitted:
        if not state.last:
            state.last = weights_of(self._evaluated())
        freeze(self.model, (), self.trained)
        if not state.best:
            state.best, state.best_epoch = state.last, max(0, state.epoch - 1)
        last = weights_of(self._plain(copy.deepcopy(self.model), state.last))
        return Fitted(
            model=self._plain(self.model, state.best).eval(),
            last_state=last,
            epochs=state.rows,
            best_epoch=state.best_epoch,
            flags=[*state.flags, *(overfitting_flags(state.rows, state.best_epoch) if self.adversarial else [])],
            notes=state.notes,
            seconds=round(state.seconds, 3),
            poison=self.poison,
        )
