"""The trained model that a student learns from: frozen, in eval mode, and no part of the student."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustkit.compress.masks import plain_copy
from robustkit.errors import UsageError
from robustkit.train.layout import to_channels_last


class Teacher:
    """A frozen copy of a model that answers without a graph; the model itself is left as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = plain_copy(model).eval().requires_grad_(False)
        self._device: torch.device | None = None
        self._layout = torch.contiguous_format
        self._asked: Tensor | None = None
        self._answered: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]; the same images twice cost one forward."""
        if self._asked is not x or self._answered is None:
            if self._device != x.device:
                self._settle(x)
            with torch.no_grad():
                self._answered = self._model(x.contiguous(memory_format=self._layout))
            # Kept with its answer, so that no other images can come to lie where these did.
            self._asked = x
        return self._answered

    def _settle(self, x: Tensor) -> None:
        """Move to the device of the images, in the layout that the model takes there."""
        channels, height, width = x.shape[1:]
        model = self._model.to(x.device)
        self._model, self._layout = to_channels_last(model, (channels, height, width), x.device)
        self._device = x.device


@dataclass
class Seat:
    """Where a defense keeps its teacher once it has one."""

    taken: Teacher | None = field(default=None, repr=False)

    def teacher(self, name: str) -> Teacher:
        """Return the teacher of the defense `name`.

        Raises:
            UsageError: it has none.
        """
        if self.taken is None:
            raise UsageError(
                f"{name} has no teacher: write `teacher: <variant>` beside its defenses, or call take_teacher(model) "
                "before the training"
            )
        return self.taken
