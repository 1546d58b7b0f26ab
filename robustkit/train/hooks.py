"""What a defense can do to training: typed hooks that all default to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustkit.attacks.threat import Threat
from robustkit.recipe.spec import EXCLUSIVE_HOOKS

if TYPE_CHECKING:
    from robustkit.data.split import Dataset, Split


class Decision(Enum):
    """What a defense or a guard asks for after an epoch."""

    CONTINUE = "continue"
    STOP = "stop"
    ROLLBACK = "rollback"
    FAIL = "fail"


@dataclass
class Batch:
    """One training batch. x (N, C, H, W) float in [0, 1]; y (N,) int64; target (N, classes) or None."""

    x: Tensor
    y: Tensor
    index: Tensor
    classes: int
    target: Tensor | None = None
    weight: Tensor | None = None
    x_adv: Tensor | None = None

    def soft_target(self) -> Tensor:
        """Return the labels as probabilities (N, classes): the soft target if there is one, else one-hot."""
        if self.target is not None:
            return self.target
        return nn.functional.one_hot(self.y, self.classes).to(self.x.dtype)


@dataclass
class Step:
    """Where training stands, as one plugin sees it. `generator` belongs to the plugin, on the batch's device."""

    model: nn.Module
    epoch: int
    epochs: int
    progress: float
    """Share of the training that is done, in [0, 1]."""
    threat: Threat
    generator: torch.Generator
    length: float = 0.0
    """Share of the training that this step is; 0 between steps."""
    ramp: float = 1.0
    """Share of the variant's eps that `threat` has in this step; below 1 while it still grows."""
    label: str = ""
    """The plugin's name, for messages."""

    @property
    def done(self) -> float:
        """Share of the training that is done once this step is."""
        return self.progress + self.length


@dataclass
class Forward:
    """Logits of the batch, computed on first use and shared by the objective and every penalty."""

    model: Callable[[Tensor], Tensor]
    batch: Batch
    main: Callable[[Forward], Tensor] | None = None
    _memo: dict[str, Tensor] = field(default_factory=dict)

    def clean(self) -> Tensor:
        """Return the logits (N, classes) of the clean images, with a graph."""
        return self._logits("clean", self.batch.x)

    def adversarial(self) -> Tensor:
        """Return the logits of `batch.x_adv`; of the clean images where no defense perturbs."""
        if self.batch.x_adv is None:
            return self.clean()
        return self._logits("adversarial", self.batch.x_adv)

    def loss(self) -> Tensor:
        """Return the main loss that this step lowers, a scalar with a graph: what around_step may climb (AWP, SAM)."""
        if self.main is None:
            target = self.batch.y if self.batch.target is None else self.batch.target
            return nn.functional.cross_entropy(self.adversarial().float(), target)
        return self.main(self)

    def _logits(self, key: str, x: Tensor) -> Tensor:
        if key not in self._memo:
            self._memo[key] = self.model(x)
        return self._memo[key]

    def forget(self) -> None:
        """Drop the memoised logits (after the weights were changed inside a step)."""
        self._memo.clear()


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch. Accuracies are fractions of 1 on the validation split, or None."""

    epoch: int
    loss: float
    train_accuracy: float
    clean: float
    robust: float | None = None
    single_step: float | None = None


@dataclass(frozen=True)
class DataContext:
    """What a data defense may use: the seed's generator, the variant's model builder, a log and a probe."""

    generator: torch.Generator
    device: torch.device
    log: Callable[[str, Mapping[str, Any]], None]
    """log(message, numbers): goes into the events and the report, e.g. which examples were removed."""
    features: Callable[[Split], Tensor]
    """Features (N, D) of a split from a probe model that is trained on the training data on first use."""
    test: Split | None = None
    """The test split, to report leaks only; a defense must never train on it."""


class Defense:
    """Base of every defense. Each hook is optional; the defaults do nothing.

    A defense that overrides a hook named in EXCLUSIVE_HOOKS owns it: two owners in one variant are a recipe
    error.
    Hooks run in the order in which the recipe lists the defenses.
    """

    def partition(self, data: Dataset, validation: float) -> list[Dataset] | None:
        """EXCLUSIVE. Return the parts of the data on which one model each is trained, to vote; None for one model.

        `validation`: the share of each part that is to be held out.
        """
        return None

    def take_teacher(self, teacher: nn.Module) -> None:
        """Take the trained model to learn from, before everything else; a defense that overrides this needs one.

        In a recipe it is the variant that `teacher:` names. The model may be used elsewhere: keep a frozen copy.
        """

    def take_members(self, members: Sequence[nn.Module]) -> None:
        """Take the trained models that answer beside the model, before wrap; a wrapper that overrides this needs them.

        In a recipe they are the variants that its parameter `members`, a list of labels, names.
        """

    def prepare_data(self, data: Split, context: DataContext) -> Split:
        """Filter, deduplicate or relabel the training data before the first epoch."""
        return data

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Insert layers (dropout, spectral norm); runs once, after compression's first masks."""
        return model

    def restore_model(self, model: nn.Module) -> nn.Module:
        """Take out again what prepare_model put in, so that the stored model is plain."""
        return model

    def parameter_groups(self, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        """Change the optimizer's parameter groups (weight decay, learning rates)."""
        return groups

    def sample_weights(self, labels: Tensor, context: DataContext) -> Tensor | None:
        """EXCLUSIVE. Return sampling weights (N,) for drawing with replacement, or None; after every prepare_data."""
        return None

    def replays(self) -> int:
        """Return how many optimizer steps each batch takes, from 1 on: free adversarial training."""
        return 1

    def ramp(self, step: Step) -> float:
        """Return the share of the threat's eps to train at now, in [0, 1]: a curriculum. At 0 nothing is perturbed."""
        return 1.0

    def budget(self, threat: Threat) -> float:
        """Return how far perturb may go, in the threat's norm; audited while training (`guards`)."""
        return float(threat.eps)

    def transform_batch(self, batch: Batch, step: Step) -> Batch:
        """Change images or targets: mixup, cutmix, label smoothing."""
        return batch

    def perturb(self, batch: Batch, step: Step) -> Tensor | None:
        """EXCLUSIVE inner maximisation. Return x_adv, or None for clean training."""
        return None

    def objective(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """EXCLUSIVE main loss, per example (N,); None for cross-entropy on forward.adversarial()."""
        return None

    def loss_weights(self, losses: Tensor, batch: Batch, step: Step) -> Tensor | None:
        """EXCLUSIVE. Return weights (N,) of the main losses (N,), which come without a graph; None for the mean."""
        return None

    def penalty(self, batch: Batch, forward: Forward, step: Step) -> Tensor | None:
        """Return a scalar that is added to the loss."""
        return None

    def around_step(self, batch: Batch, forward: Forward, step: Step) -> AbstractContextManager[None]:
        """Wrap forward and backward: AWP."""
        return nullcontext()

    def second_pass(self, step: Step) -> AbstractContextManager[None] | None:
        """EXCLUSIVE. Return where the gradients are to be taken again, at other weights (SAM); None: once is enough.

        Runs after backward. The context moves the weights and puts them back; in between the loss is computed anew,
        on the same adversarial images, and its gradients take the place of the first ones.
        """
        return None

    def after_backward(self, step: Step) -> None:
        """Change the gradients before the optimizer's step: clipping."""

    def after_step(self, step: Step) -> None:
        """Run after the optimizer's step: EMA, masks."""

    def after_epoch(self, report: EpochReport) -> Decision:
        """Ask to go on, to stop, to undo this epoch (half the learning rate, three times at most), or to fail.

        An epoch that is undone takes the defense's own state with it.
        """
        return Decision.CONTINUE

    def ready(self, step: Step) -> bool:
        """Say whether a checkpoint of this epoch may be selected (False while eps or sparsity still grow)."""
        return True

    def evaluated_model(self, model: nn.Module) -> nn.Module:
        """EXCLUSIVE. Return the model to evaluate and to store (EMA or SWA weights)."""
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model for inference (purification, smoothing, ensembles)."""
        return model

    def attack_view(self, wrapped: nn.Module) -> nn.Module:
        """Return the differentiable view of a wrapped model that attacks use."""
        return wrapped

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict returned."""


def evaluated_model(model: nn.Module, defenses: Sequence[Defense]) -> nn.Module:
    """Return the model to evaluate and to store, by the last defense first.

    Masks come first of all and have the last word: what is averaged over time remembers what was dropped since.
    """
    for defense in reversed(defenses):
        model = defense.evaluated_model(model)
    return model


def is_adversarial(defense: Defense) -> bool:
    """Say whether the defense trains on perturbed images (checkpoints are then selected by robust accuracy)."""
    return type(defense).perturb is not Defense.perturb


def is_taught(defense: Defense) -> bool:
    """Say whether the defense learns from a teacher."""
    return type(defense).take_teacher is not Defense.take_teacher


def is_joined(defense: Defense) -> bool:
    """Say whether other trained models answer beside the model that the defense wraps."""
    return type(defense).take_members is not Defense.take_members


def owned_hooks(defense: type[Defense]) -> tuple[str, ...]:
    """Return the exclusive hooks that this defense overrides."""
    overridden = overridden_hooks(defense)
    return tuple(hook for hook in EXCLUSIVE_HOOKS if hook in overridden)


def overridden_hooks(defense: type[Defense]) -> tuple[str, ...]:
    """Return the hooks that this defense overrides."""
    hooks = [name for name, made in vars(Defense).items() if callable(made) and not name.startswith("_")]
    return tuple(hook for hook in hooks if getattr(defense, hook) is not getattr(Defense, hook))
