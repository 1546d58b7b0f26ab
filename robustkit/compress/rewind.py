"""Lottery tickets: the masks of a trained model on the weights that it had early in its training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.compress.base import CompressContext
from robustkit.errors import ModelError, TrainingError
from robustkit.params import NonNegativeInt
from robustkit.train.hooks import Defense, Step


@torch.no_grad()
def rewind(model: nn.Module, early: Mapping[str, Tensor]) -> None:
    """Give a model these parameters and buffers, in place; zeros are for the caller's masks.

    Raises:
        ModelError: they are those of another architecture.
    """
    now = model.state_dict()
    wrong = sorted(set(early) ^ set(now)) or [name for name, value in now.items() if early[name].shape != value.shape]
    if wrong:
        raise ModelError(f"rewind: the early weights do not fit the model, e.g. {wrong[0]}")
    for name, value in now.items():
        value.copy_(early[name])


@dataclass(frozen=True)
class Rewind:
    """Put the weights that stay back to their early values: a lottery ticket (Frankle & Carbin 2019)."""

    epoch: NonNegativeInt = 0

    def start(self, model: nn.Module, context: CompressContext) -> None:
        """Rewind the model, after the masks were chosen.

        Raises:
            ModelError: nobody kept the early weights, or they do not fit.
        """
        if context.early is None:
            raise ModelError("rewind needs the early weights; pass `early` to MaskKeeper")
        rewind(model, context.early(self.epoch))


class EpochKeeper(Defense):
    """Keeps copies of the weights after some epochs of a training (1 is the first).

    `defenses`: what has changed the model for the training; the copies are of the plain model, without it.
    """

    def __init__(self, epochs: Sequence[int], defenses: Sequence[Defense] = ()) -> None:
        self._epochs = frozenset(epochs)
        self._defenses = tuple(defenses)
        self._kept: dict[str, dict[str, Tensor]] = {}

    def after_step(self, step: Step) -> None:
        """Copy the weights where an epoch that is asked for ends with this step."""
        last = step.done * step.epochs > step.epoch + 1 - step.length * step.epochs / 2
        if last and step.epoch + 1 in self._epochs:
            plain = copy.deepcopy(step.model)
            for defense in reversed(self._defenses):
                plain = defense.restore_model(plain)
            self._kept[str(step.epoch + 1)] = {
                name: value.detach().clone() for name, value in plain.state_dict().items()
            }

    def weights(self, epoch: int) -> dict[str, Tensor]:
        """Return the weights after an epoch.

        Raises:
            TrainingError: the training ended before it.
        """
        if str(epoch) not in self._kept:
            raise TrainingError(f"the training ended before epoch {epoch}, to which another variant is rewound")
        return self._kept[str(epoch)]

    def state_dict(self) -> dict[str, Any]:
        """Return the copies."""
        return {"kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""
        self._kept = dict(state["kept"])
