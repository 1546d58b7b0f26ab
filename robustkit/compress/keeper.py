"""Holds masks through training: applied after every step, advanced along their schedule, checked at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from robustkit.attacks.threat import Threat
from robustkit.compress.base import (
    CompressContext,
    Compressor,
    Counting,
    Finisher,
    Promised,
    Quantizer,
    Starter,
    scheduled_sparsity,
)
from robustkit.compress.masks import Masks, hook_masks, sparsity_of, without_hooks, zero_masks
from robustkit.compress.torch_methods import TorchMethod
from robustkit.data.split import Split
from robustkit.errors import ModelError, UsageError
from robustkit.results import Flag
from robustkit.seeding import derive_seed
from robustkit.train.hooks import Defense, Step

CUT_SHORT = "pruned-after-training"
CUT_SHORT_MESSAGE = (
    "training ended before the pruning schedule did: pruned to {:.0%} afterwards, with no training to follow; train to "
    "the end, or let the schedule end earlier"
)


def as_compressor(made: object) -> Compressor:
    """Return a pruning method as it is, or a torch.nn.utils.prune method wrapped as one.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(made, BasePruningMethod):
        return TorchMethod(made)
    if isinstance(made, Compressor):
        return made
    raise UsageError(f"{type(made).__name__} is no pruning method: it needs sparsity, schedule and masks(...)")


class MaskKeeper(Defense):
    """The compression of one variant as a training hook.

    The masks stand beside a plain model and are applied after every optimizer step, so that no momentum, weight decay
    or averaging brings a zero back. `inherit`: what is zero in the model at the start stays zero. `held`: masks that
    the model came with. A model with torch.nn.utils.prune hooks is made plain, and its masks are held. `train`:
    training images for methods that look at them; `early`: weights after an epoch, for methods that go back to them;
    `defenses`: the variant's, for methods that learn with its loss.
    Starters (rewind) run before the training, finishers (shrink) in `finish`, after it, and quantizers in `quantize`,
    last.
    """

    def __init__(
        self,
        compressors: Sequence[object],
        *,
        inherit: bool,
        context_seed: int,
        example: Tensor,
        threat: Threat,
        held: Masks | None = None,
        train: Split | None = None,
        early: Callable[[int], Mapping[str, Tensor]] | None = None,
        defenses: Sequence[tuple[str, Defense]] = (),
    ) -> None:
        self.starters = [made for made in compressors if isinstance(made, Starter)]
        self.finishers = [made for made in compressors if isinstance(made, Finisher)]
        self.quantizers = [made for made in compressors if isinstance(made, Quantizer)]
        others = Starter | Finisher | Quantizer
        self.compressors = [as_compressor(made) for made in compressors if not isinstance(made, others)]
        self.masks = Masks()
        self.flags: list[Flag] = []
        self.notes: list[str] = []
        self._train = train
        self._early = early
        self._defenses = tuple(defenses)
        self._inherit = inherit
        self._held = held or Masks()
        self._seed = context_seed
        self._example = example
        self._threat = threat
        self._whole: nn.Module | None = None
        self._start: list[float] = []
        self._done = [0 for _ in self.compressors]

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Take over the zeros of the parent and of hooks, then apply every one-shot method."""
        model = self._begin(model)
        scheduled = any(method.schedule != "one_shot" for method in self.compressors)
        if scheduled:
            self._rehearse(model)
        for number, method in enumerate(self.compressors):
            self._start.append(self._reached(model, method))
            if method.schedule == "one_shot":
                self._advance(model, number, method.sparsity)
        if not scheduled:
            self._check(model)
        for number, starter in enumerate(self.starters):
            starter.start(model, self._made(model, derive_seed(self._seed, "start", number)))
            self.masks.apply_(model)
        return model

    def compress(self, model: nn.Module) -> nn.Module:
        """Apply everything at its final sparsity, without training."""
        model = self._begin(model)
        for number, method in enumerate(self.compressors):
            self._advance(model, number, method.sparsity)
            self._done[number] = method.updates
        return model

    def _begin(self, model: nn.Module) -> nn.Module:
        self._start = []
        self.masks = self._held.narrowed(hook_masks(model).tensors)
        model = without_hooks(model)
        if self._inherit:
            self.masks = self.masks.narrowed(zero_masks(model).tensors)
        self.masks.apply_(model)
        return model

    @torch.no_grad()
    def _rehearse(self, model: nn.Module) -> None:
        """Prune to the end and back: what cannot be reached is said before the training and not after it."""
        masks, weights = self.masks, {name: value.detach().clone() for name, value in model.named_parameters()}
        for number, method in enumerate(self.compressors):
            self._advance(model, number, method.sparsity)
        self._check(model)
        self.masks = masks
        for name, value in model.named_parameters():
            value.copy_(weights[name])

    def _reached(self, model: nn.Module, method: Compressor) -> float:
        return method.reached(model, self._context(model)) if isinstance(method, Counting) else sparsity_of(model)

    def after_backward(self, step: Step) -> None:
        """Take pruned weights out of the gradients, so that they do not count in a norm that is clipped."""
        self.masks.apply_to_gradients_(step.model)

    def after_step(self, step: Step) -> None:
        """Advance the schedules that are due and hold the masks."""
        for number, method in enumerate(self.compressors):
            if method.schedule != "one_shot":
                due = updates_due(method, step.done)
                if due > self._done[number]:
                    self._done[number] = due
                    # The optimizer's momentum has just moved what was dropped: scores are of the masked weights.
                    self.masks.apply_(step.model)
                    reached = scheduled_sparsity(
                        method.schedule, self._start[number], method.sparsity, due / method.updates
                    )
                    self._advance(step.model, number, reached)
        self.masks.apply_(step.model)

    def evaluated_model(self, model: nn.Module) -> nn.Module:
        """Hold the masks in averaged weights too: a weight lives on in its average after it was dropped.

        Averages of biases and batch norms live on as well, in channels that were dropped.
        """
        if set(self.masks.tensors) <= set(dict(model.named_parameters())):
            self.masks.apply_(model)
        return model

    def ready(self, step: Step) -> bool:
        """Say whether every schedule has reached its sparsity."""
        return not self._left()

    def _left(self) -> list[int]:
        """Return the methods whose schedules have not reached their sparsity."""
        return [
            number
            for number, method in enumerate(self.compressors)
            if method.schedule != "one_shot" and self._done[number] < method.updates
        ]

    def finish(self, model: nn.Module) -> nn.Module:
        """Complete schedules that the training left open, with a flag; apply the masks, check them, run the finishers.

        Raises:
            ModelError: the sparsity is not what was asked, or a layer is empty that nobody asked to empty, or a
                finisher failed.
        """
        for number in self._left():
            method = self.compressors[number]
            self.flags.append(Flag(id=CUT_SHORT, severity="doubt", message=CUT_SHORT_MESSAGE.format(method.sparsity)))
            self._advance(model, number, method.sparsity)
            self._done[number] = method.updates
        self.masks.apply_(model)
        self._check(model)
        self._whole = model
        return self._finished(model, self._note)

    def finish_last(self, model: nn.Module) -> nn.Module:
        """Return the last epoch's weights in the form that `finish` gave the best ones, without notes."""
        self.masks.apply_(model)
        return self._finished(model, lambda message: None)

    def _finished(self, model: nn.Module, note: Callable[[str], None]) -> nn.Module:
        for number, finisher in enumerate(self.finishers):
            context = self._made(model, derive_seed(self._seed, "finish", number))
            model = finisher.finish(model, replace(context, note=note))
        return model

    def shipped(self, model: nn.Module, artefact: Path) -> None:
        """Measure what methods promised on the finished model and its file.

        Raises:
            ModelError: it costs more than was promised.
        """
        for method in self.compressors:
            if isinstance(method, Promised) and self._whole is not None:
                flag = method.shipped(self._whole, model, artefact, self._context(model))
                self.flags += [flag] if flag is not None else []

    def trainings(self, model: nn.Module) -> list[tuple[str, Defense]]:
        """Return what a model's quantization asks of its training, with labels."""
        made = self._made(model, derive_seed(self._seed, "training", 0))
        found = [(f"quantized#{number}", one.training(made)) for number, one in enumerate(self.quantizers)]
        return [(label, defense) for label, defense in found if defense is not None]

    def quantize(self, model: nn.Module) -> nn.Module:
        """Return the quantized model of a finished one; the model itself where nothing quantizes it."""
        for number, quantizer in enumerate(self.quantizers):
            model = quantizer.quantize(model, self._made(model, derive_seed(self._seed, "quantize", number)))
        return model

    def _check(self, model: nn.Module) -> None:
        for method in self.compressors:
            method.check(model, self._context(model))
        caps = [getattr(method, "max_layer_sparsity", None) for method in self.compressors]
        if any(cap is not None and cap >= 1 for cap in caps):
            return
        hint = ", or set max_layer_sparsity: 1" if any(cap is not None for cap in caps) else ""
        for name, mask in self.masks.tensors.items():
            if self.compressors and mask.dim() > 1 and not bool(mask.any()):
                raise ModelError(f"pruning emptied {name}; lower the sparsity{hint}")

    def _context(self, model: nn.Module, number: int = 0) -> CompressContext:
        return self._made(model, derive_seed(self._seed, number, self._done[number] if self._done else 0))

    def _made(self, model: nn.Module, seed: int) -> CompressContext:
        example = self._example.to(next(model.parameters()).device)
        generator = torch.Generator().manual_seed(seed)
        return CompressContext(example, generator, self._threat, self._train, self._note, self._early, self._defenses)

    def _note(self, message: str) -> None:
        # Masks are made more than once: rehearsed, then for good, then at each update.
        if message not in self.notes:
            self.notes.append(message)

    def _advance(self, model: nn.Module, number: int, sparsity: float) -> None:
        method = self.compressors[number]
        self.masks = method.masks(model, self.masks, sparsity, self._context(model, number))
        self.masks.apply_(model)

    def state_dict(self) -> dict[str, Any]:
        """Return masks and where each schedule stands."""
        return {"masks": self.masks.state_dict(), "start": list(self._start), "done": list(self._done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""
        self.masks = Masks.from_state_dict(state["masks"])
        self._start = list(state["start"])
        self._done = list(state["done"])


def updates_due(method: Compressor, progress: float) -> int:
    """Return how many of a schedule's updates are due at this share of training."""
    # Shares of the training are sums of floats: the last step ends at 1 within rounding.
    progress += 1e-9
    if progress < method.begin:
        return 0
    if progress >= method.end:
        return method.updates
    return int((progress - method.begin) / (method.end - method.begin) * method.updates)
