"""The recipe after parsing: frozen values that plan, pipeline and training read. No torch is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Norm = Literal["linf", "l2", "l1", "l0"]
Runtime = Literal["eager", "inductor", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
EXCLUSIVE_HOOKS = (
    "sample_weights",
    "perturb",
    "objective",
    "loss_weights",
    "partition",
    "second_pass",
    "evaluated_model",
)
"""Hooks of a defense that only one defense of a variant may own."""
WHOLE_BATCH_HOOKS = ("loss_weights", "replays", "second_pass")
"""Hooks of a defense that look at the whole batch at once, so that it cannot be trained on in pieces."""


class Spec(BaseModel):
    """Base of every part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Use(Spec):
    """One use of a plugin: its name, its parameters after checking, and the label that tells it from other uses."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    label: str


class ThreatSpec(Spec):
    """Norm and budget of the adversary; eps in [0, 1] pixel units, under l0 the number of values that may change."""

    norm: Norm = "linf"
    eps: float = 8 / 255


class StageSpec(Spec):
    """One stage of a training; what it leaves out is as under `train:`."""

    epochs: int
    lr: float = 1.0
    """Factor on the learning rate of the optimizer and its schedule."""
    eps: float = 1.0
    """Share of the threat's eps that adversarial training uses."""
    resolution: int | None = None
    """Pixels a side to which the training images are resized."""
    batch_size: int | None = None
    freeze: tuple[str, ...] = ()
    """Layers whose weights and statistics stay as they are, by the names or prefixes of their modules."""


class TrainSpec(Spec):
    """How one variant is trained."""

    epochs: int = 10
    batch_size: int = 128
    optimizer: Use = Use(name="sgd", parameters={"lr": 0.1, "momentum": 0.9}, label="sgd")
    schedule: Use = Use(name="one_cycle", label="one_cycle")
    augment: tuple[Use, ...] = ()
    validation: float = 0.1
    select: Literal["auto", "clean", "robust", "last"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = False
    accumulate: int = 1
    """Pieces of a batch that are computed one after the other; their gradients add up."""
    checkpointing: bool = False
    """Compute the model's blocks again in the backward instead of keeping what is inside them."""
    deterministic: bool = False
    """Use deterministic algorithms alone."""
    memory_limit: int | None = None
    guards: bool = True
    time_limit: float | None = None
    """Seconds that the training may take: beyond them there is a warning, and nothing else changes."""
    stages: tuple[StageSpec, ...] = ()
    """Their epochs add up to `epochs`."""
    monitor_test: bool = False
    """Measure loss and accuracy on the test split after each epoch too; nothing is chosen by them."""


class NormalizeSpec(Spec):
    """Mean and deviation of each channel in [0, 1], which the model normalizes its images with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class VariantSpec(Spec):
    """One variant: where it starts from, what is done to it. Inheritance is already resolved."""

    label: str
    parent: str | None = None
    teacher: str | None = None
    """The variant whose answers this one learns from; no weights are taken over."""
    model: Use
    threat: ThreatSpec
    defenses: tuple[Use, ...] = ()
    wrappers: tuple[Use, ...] = ()
    """Those of the defenses that wrap the model for inference."""
    members: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By the label of a wrapper: the variants that answer beside this one."""
    compress: tuple[Use, ...] = ()
    train: TrainSpec | None = None


class EvaluateSpec(Spec):
    """How every variant is attacked and measured."""

    examples: int | None = None
    batch_size: int = 256
    attacks: tuple[Use, ...] = ()
    eps_curve: tuple[float, ...] = ()
    latency: bool | Literal["full"] | tuple[Runtime, ...] = True
    """True: eager alone. `full`, or a list of runtimes: each of them, with one thread and all."""
    gallery: int = 8
    certify: tuple[Use, ...] = ()
    corruptions: bool = False
    audit: int = 0
    """So many of the examples that withstand every attack meet AutoAttack-standard."""
    quantize_input: bool = False
    """Adversarial images are rounded to 8 bits before they are judged."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What attacks may search in; the model's own precision judges."""
    compile: bool = False
    """Attacks may compile the model, where it measures faster."""

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        """The runtimes of the whole table of latencies; none where only the usual figures are asked for."""
        if self.latency == "full":
            return RUNTIMES
        return () if isinstance(self.latency, bool) else self.latency


class GateSpec(Spec):
    """One gate as it was written; `confident` asks that the interval clears the line, not only the point."""

    text: str
    confident: bool = False
    every_seed: bool = False
    """Whether it must hold under each seed alone; else on the mean over seeds."""


class Recipe(Spec):
    """A whole recipe: checked, frozen, variants in topological order."""

    name: str
    path: Path | None = None
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    data: Use
    poison: Use | None = None
    """What is planted in the training data; the test data stay clean."""
    threat: ThreatSpec
    normalize: NormalizeSpec | None = None
    """None: the statistics of the training images."""
    variants: tuple[VariantSpec, ...]
    evaluate: EvaluateSpec
    gates: tuple[GateSpec, ...] = ()
    plugins: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the recipe start from."""
        return self.path.parent if self.path else Path.cwd()

    def variant(self, label: str) -> VariantSpec:
        """Return the variant with this label."""
        return next(variant for variant in self.variants if variant.label == label)
