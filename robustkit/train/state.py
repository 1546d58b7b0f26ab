"""Everything that one training carries from epoch to epoch, and copies of it to return to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustkit.results import EpochRow, Flag
from robustkit.train.engine import TrainingEngine, engine_from
from robustkit.train.guards import Guards
from robustkit.train.hooks import Defense

Named = Sequence[tuple[str, Defense]]
Weights = dict[str, Tensor]


class Checkpoint(Protocol):
    """Where a training keeps its state between epochs: tensors and plain values, no pickled objects."""

    def load(self) -> dict[str, Any] | None:
        """Return the state of the last whole epoch, or None."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state."""
        ...


@dataclass
class TrainingState:
    """What a training knows after an epoch."""

    guards: Guards
    epoch: int = 0
    """The next epoch, from 0."""
    stopped: bool = False
    """Whether a defense or a guard has ended the training before its last epoch."""
    rows: list[EpochRow] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    best_epoch: int = -1
    best_score: tuple[float, float] = (-1.0, -1.0)
    last: Weights = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    engine: TrainingEngine | None = None
    """How the first epoch was computed: the others are computed so too."""


def weights_of(model: nn.Module) -> Weights:
    """Return copies of a model's parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, defenses: Named) -> dict[str, Any]:
    """Return copies of what an optimizer step changes."""
    return {
        "model": weights_of(model),
        "optimizer": _copied(optimizer.state_dict()),
        "defenses": {label: _copied(defense.state_dict()) for label, defense in defenses},
    }


def restore(saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, defenses: Named) -> None:
    """Put back what snapshot copied; the snapshot stays usable."""
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(_copied(saved["optimizer"]))
    for label, defense in defenses:
        defense.load_state_dict(_copied(saved["defenses"][label]))


def _copied(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def to_file(state: TrainingState, good: dict[str, Any]) -> dict[str, Any]:
    """Return the state as tensors and plain values, for a checkpoint."""
    return {
        **good,
        "epoch": state.epoch,
        "stopped": state.stopped,
        "rows": [row.model_dump() for row in state.rows],
        "best": state.best,
        "best_epoch": state.best_epoch,
        "best_score": list(state.best_score),
        "last": state.last,
        "flags": [flag.model_dump() for flag in state.flags],
        "notes": list(state.notes),
        "seconds": state.seconds,
        "guards": state.guards.state_dict(),
        "engine": state.engine.plain() if state.engine else None,
    }


def from_file(saved: dict[str, Any], guards: Guards) -> TrainingState:
    """Return the state that to_file described."""
    guards.load_state_dict(saved["guards"])
    return TrainingState(
        guards=guards,
        epoch=int(saved["epoch"]),
        stopped=bool(saved.get("stopped")),
        rows=[EpochRow.model_validate(row) for row in saved["rows"]],
        best=saved["best"],
        best_epoch=int(saved["best_epoch"]),
        best_score=(float(saved["best_score"][0]), float(saved["best_score"][1])),
        last=saved["last"],
        flags=[Flag.model_validate(flag) for flag in saved["flags"]],
        notes=[str(note) for note in saved["notes"]],
        seconds=float(saved["seconds"]),
        engine=engine_from(saved.get("engine")),
    )
