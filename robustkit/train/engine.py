"""How a model is computed while it is trained: in which precision, compiled or not; `auto` takes what is faster.

The trial is made once. What it chose goes into the training's checkpoint and, by model, batch and machine, into a file,
so that a training that is resumed or repeated computes as before: another choice would give other numbers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.errors import TrainingError
from robustkit.precision import autocast, has_bf16, processor
from robustkit.recipe.spec import TrainSpec
from robustkit.store import write_json

GAIN = 1.1
"""So many times faster than plain another way has to be: a clock's noise must not decide."""
ROUNDS = 3, 10
"""At least so many, if they do not take SECONDS, and more up to so many while they take less than a second."""
WARM = 2
"""Steps before the clock runs: the first one compiles."""
SECONDS = 5.0
"""After so long no other round begins."""
LEAST_MACS = 200_000_000
"""A batch of fewer multiply-accumulates in a forward is computed in float32 on a CPU, without a trial.

There bfloat16 gains little, if anything, and a trial of a few milliseconds would not end the same way each time.
"""
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class TrainingEngine:
    """One way to compute a training step, and what a trial measured: seconds a step, by the name of the way."""

    bf16: bool = False
    compiled: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The way in words."""
        return ("bf16" if self.bf16 else "fp32") + (" compiled" if self.compiled else "")

    @property
    def precision(self) -> torch.dtype | None:
        """What operations are autocast to; None leaves them as they are."""
        return torch.bfloat16 if self.bf16 else None

    def runner(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what computes the logits of a training step."""
        return torch.compile(model) if self.compiled else model

    def note(self) -> str | None:
        """Return what was measured, in a line; None where there was nothing to choose."""
        if not self.seconds:
            return None
        plainest_first = sorted(self.seconds.items(), key=lambda one: ("compiled" in one[0], "bf16" in one[0]))
        measured = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in plainest_first)
        return f"trained in {self.name}; a forward and backward measured: {measured}"

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def engine_from(values: object) -> TrainingEngine | None:
    """Return the engine that `plain` described; None for anything else."""
    if not isinstance(values, dict):
        return None
    seconds = values.get("seconds")
    if not isinstance(values.get("bf16"), bool) or not isinstance(values.get("compiled"), bool):
        return None
    if not isinstance(seconds, dict) or not all(isinstance(one, float) for one in seconds.values()):
        return None
    return TrainingEngine(values["bf16"], values["compiled"], {str(name): one for name, one in seconds.items()})


def candidates(spec: TrainSpec, lower: bool) -> list[TrainingEngine]:
    """Return the ways that a training may take, the plainest first; lower: whether `auto` may take bfloat16."""
    bf16 = {"fp32": [False], "bf16": [True], "auto": [False, True] if lower else [False]}[spec.precision]
    compiled = {True: [True], False: [False], "auto": [False, True]}[spec.compile]
    return [TrainingEngine(one, other) for other in compiled for one in bf16]


def worth_bf16(model: nn.Module, x: Tensor) -> bool:
    """Say whether bfloat16 is worth a trial for a model on batches like x (N, C, H, W): it multiplies enough."""
    return has_bf16(x.device) and (x.device.type != "cpu" or batch_macs(model, x) >= LEAST_MACS)


def batch_macs(model: nn.Module, x: Tensor) -> int:
    """Return the multiply-accumulates of convolutions and linear layers on a batch x (N, C, H, W); 0 if it fails.

    They are counted on two of its images, as many as a batch norm needs. torch's own counter takes 80 MB and two
    seconds for what it imports.
    """
    found = [0]

    def count(module: nn.Module, _: object, y: Tensor) -> None:
        assert isinstance(module, LAYERS)
        found[0] += y.numel() * module.weight[0].numel()

    trial = copy.deepcopy(model)
    for module in trial.modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(count)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(x[:2])
    except Exception:  # what is wrong with the model is said by the training
        return 0
    return found[0] * len(x) // len(x[:2])


def choose(
    spec: TrainSpec, model: nn.Module, x: Tensor, device: torch.device, choices: Path | None, classes: int
) -> TrainingEngine:
    """Return the way to train a model on batches like x (N, C, H, W) on the device.

    choices: a folder where a choice is kept for the next training of its kind; None keeps none.

    Raises:
        TrainingError: `compile: true`, and torch.compile fails on this model or machine.
    """
    ways = candidates(spec, spec.precision == "auto" and worth_bf16(model, x))
    if len(ways) == 1:
        if ways[0].compiled:
            _check_compiles(ways[0], model, x, classes)
        return ways[0]
    place = None if choices is None else choices / f"{_kind(spec, model, x, device)}.json"
    known = None if place is None else _read(place)
    if known is not None:
        return known
    chosen = _tried(ways, model, x, classes)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, chosen.plain())
    return chosen


def _check_compiles(engine: TrainingEngine, model: nn.Module, x: Tensor, classes: int) -> None:
    failed = _Trial(engine, model, x, classes).step()
    if failed is not None:
        raise TrainingError(
            f"compile: true: torch.compile fails here: {_first_line(failed)}; use compile: auto or compile: false"
        )


def _kind(spec: TrainSpec, model: nn.Module, x: Tensor, device: torch.device) -> str:
    """Return the name under which a choice is kept: what its measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    parts = [str(model), list(x.shape), spec.precision, spec.compile, name, torch.get_num_threads(), torch.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    return f"{processor().get('cpu_name', 'cpu')} {torch.backends.cpu.get_cpu_capability()}"


def _read(place: Path) -> TrainingEngine | None:
    try:
        return engine_from(json.loads(place.read_bytes()))
    except (OSError, ValueError):
        return None


def _tried(ways: list[TrainingEngine], model: nn.Module, x: Tensor, classes: int) -> TrainingEngine:
    trials = [_Trial(way, model, x, classes) for way in ways]
    working = [trial for trial in trials if all(trial.step() is None for _ in range(WARM))]
    if not working:
        # What is wrong with the model itself is said by the training.
        return ways[0]
    best = dict.fromkeys((trial.engine.name for trial in working), float("inf"))
    begun = time.perf_counter()
    for number in range(1, ROUNDS[1] + 1):
        for trial in working:
            started = time.perf_counter()
            trial.step()
            best[trial.engine.name] = min(best[trial.engine.name], time.perf_counter() - started)
        spent = time.perf_counter() - begun
        if spent > SECONDS or (number >= ROUNDS[0] and spent > 1):
            break
    seconds = {name: round(value, 6) for name, value in best.items()}
    fastest = min(working, key=lambda trial: best[trial.engine.name]).engine
    plain = working[0].engine
    chosen = fastest if best[fastest.name] * GAIN <= best[plain.name] else plain
    return TrainingEngine(chosen.bf16, chosen.compiled, seconds)


class _Trial:
    """Steps of a copy of the model, whose own weights and statistics stay as they are."""

    def __init__(self, engine: TrainingEngine, model: nn.Module, x: Tensor, classes: int) -> None:
        self.engine = engine
        self._model = copy.deepcopy(model).train()
        self._run = engine.runner(self._model)
        self._x = x
        self._y = torch.arange(len(x), device=x.device) % classes

    def step(self) -> Exception | None:
        """Do a forward and a backward and wait for the device; return what went wrong, or None."""
        devices = [self._x.device] if self._x.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                with autocast(self._x.device.type, self.engine.precision):
                    loss = nn.functional.cross_entropy(self._run(self._x).float(), self._y)
                loss.backward()
                self._model.zero_grad(set_to_none=True)
            if self._x.device.type == "cuda":
                torch.cuda.synchronize(self._x.device)
        except Exception as error:  # a compiler may fail in any way
            return error
        return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
