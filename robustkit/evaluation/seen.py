"""What an attack did so far, a batch at a time; it can be kept and gone on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.attacks.counting import CountedModel
from robustkit.evaluation.outcome import Outcome

NO_CLASS = -1
"""The prediction from logits that are not finite."""
SAVE_EVERY = 10.0
"""Seconds between two saves."""
ARRAYS = ("prediction", "distance", "minimal", "images")
Arrays = Mapping[str, NDArray[Any]]


class Checkpoint(Protocol):
    """Where an attack keeps its whole batches."""

    def load(self) -> Arrays | None:
        """Return what was saved last, or None."""
        ...

    def save(self, arrays: Arrays) -> None:
        """Replace what was saved."""
        ...


@dataclass(frozen=True)
class Judged:
    """One batch after an attack: n examples of it."""

    clean: Tensor
    found: Tensor
    answer: Tensor
    """The model's classes (n,) of `found`."""
    length: Tensor
    """Distances (n,) of what was found."""
    inside: Tensor
    """Whether that is within the budget (n,)."""
    outside: Tensor
    """How many results did not count, and were put back."""
    silent: Tensor
    """How many examples the attack had fooled on its way, but not with what it returned."""

    def replaced(self, index: Tensor, other: Judged) -> Judged:
        """Return this with the examples at `index` as another attempt left them."""
        whole = {name: getattr(self, name).clone() for name in ("found", "answer", "length", "inside")}
        for name, values in whole.items():
            values[index] = getattr(other, name)
        return replace(self, **whole, outside=self.outside + other.outside, silent=self.silent + other.silent)


@dataclass
class Seen:
    """One entry a test example, and the first examples' images."""

    prediction: Tensor
    distance: Tensor
    minimal: Tensor
    """The smallest distance at which the example was fooled, infinity where it was not; 0 where it is wrong anyway."""
    images: Tensor
    done: int = 0
    """So many of the examples to attack are attacked."""
    projected: int = 0
    not_finite: int = 0
    silent: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    paid: tuple[int, int, float] = (0, 0, 0.0)
    """Forwards, backwards and seconds of the run before this one, which was stopped."""
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, prediction: NDArray[np.int64], images: Tensor, checkpoint: Checkpoint | None) -> Seen:
        """Return what was seen before the first batch, or what a checkpoint of as many examples holds.

        prediction (N,) without an attack; images (keep, ...): the first clean ones.
        """
        nothing = torch.zeros(len(prediction))
        fresh = cls(torch.from_numpy(prediction.copy()), nothing, nothing.clone(), images.clone())
        saved = checkpoint.load() if checkpoint is not None else None
        return fresh._resumed(saved) if saved is not None else fresh

    def _resumed(self, saved: Arrays) -> Seen:
        """Return the saved state where it fits this attack, else this one."""
        try:
            tensors = [torch.from_numpy(saved[name]) for name in ARRAYS]
            counts = [int(value) for value in saved["counts"]]
            seconds = float(saved["seconds"])
            done, projected, not_finite, silent, forwards, backwards = counts
        except (KeyError, ValueError, TypeError):
            return self
        mine = [getattr(self, name) for name in ARRAYS]
        if not 0 <= done <= len(self.prediction):
            return self
        if any(one.shape != own.shape or one.dtype != own.dtype for one, own in zip(tensors, mine, strict=True)):
            return self
        paid = (forwards, backwards, seconds)
        return Seen(
            prediction=tensors[0],
            distance=tensors[1],
            minimal=tensors[2],
            images=tensors[3],
            done=done,
            projected=projected,
            not_finite=not_finite,
            silent=silent,
            forwards=forwards,
            backwards=backwards,
            seconds=seconds,
            paid=paid,
        )

    def add(self, index: Tensor, batch: Judged) -> None:
        """Take in the batch of the examples at `index` (n,), which are right without an attack."""
        answered = batch.answer != NO_CLASS
        outside, unanswered, silent = torch.stack([batch.outside, (~answered).sum(), batch.silent]).tolist()
        self.projected += int(outside)
        self.not_finite += int(unanswered)
        self.silent += int(silent)
        # Only what is right without an attack is attacked: its prediction so far is its label.
        fooled = answered & (batch.answer != self.prediction[index].to(batch.answer.device))
        self.minimal[index] = torch.where(fooled, batch.length, torch.inf).cpu()
        counts = answered & batch.inside
        self.prediction[index] = torch.where(counts.cpu(), batch.answer.cpu(), self.prediction[index])
        self.distance[index] = batch.length.cpu()
        shown = index < len(self.images)
        kept = torch.where(counts.view(-1, *[1] * (batch.found.dim() - 1)), batch.found, batch.clean)
        self.images[index[shown]] = kept[shown.to(kept.device)].cpu()
        self.done += len(index)

    def pay(self, counted: CountedModel, seconds: float) -> None:
        """Take in what this run cost so far."""
        forwards, backwards, before = self.paid
        self.forwards = forwards + counted.forwards
        self.backwards = backwards + counted.backwards
        self.seconds = before + seconds

    def robust(self, y: Tensor, todo: Tensor) -> int:
        """Return how many of the attacked examples are still right."""
        index = todo[: self.done]
        return int((self.prediction[index] == y.cpu()[index]).sum())

    def save(self, checkpoint: Checkpoint | None, *, last: bool, followed: bool = False) -> None:
        """Keep what was seen, if some time has passed and there is more to come.

        Nothing of the last batch, whose result is stored at once; all of it where another attack follows before that.
        """
        due = followed if last else time.monotonic() - self.saved_at >= SAVE_EVERY
        if checkpoint is None or not due:
            return
        counts = [self.done, self.projected, self.not_finite, self.silent, self.forwards, self.backwards]
        checkpoint.save(
            {
                **{name: getattr(self, name).numpy() for name in ARRAYS},
                "counts": np.array(counts),
                "seconds": np.array(self.seconds),
            }
        )
        self.saved_at = time.monotonic()

    def outcome(self, y: Tensor, *, keep: int, minimal: bool) -> Outcome:
        """Return what there is to say once all batches are in; `minimal`: with the smallest distances."""
        return Outcome(
            correct=(self.prediction == y.cpu()).numpy(),
            prediction=self.prediction.numpy(),
            distance=self.distance.numpy(),
            forwards=self.forwards,
            backwards=self.backwards,
            seconds=self.seconds,
            projected=self.projected,
            not_finite=self.not_finite,
            silent=self.silent,
            minimal_distance=self.minimal.numpy() if minimal else None,
            adversarial=self.images if keep else None,
        )
