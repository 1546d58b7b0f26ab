"""What a run found, as it stands in results.json (schema 1): later versions add keys and rename none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from robustkit.records.accuracy import Corruptions, Flag, Paired, Rate, Severity
from robustkit.records.costs import Latency, LayerSparsity, Timing
from robustkit.records.fields import Amount, Count, Name, Record, Share, Text, one_line, printable
from robustkit.records.gates import GateResult, GateVerdict, StepFailure
from robustkit.records.poisoning import Filtered, Poisoning, Tolerance
from robustkit.records.robustness import Adaptive, Audit, CertifiedRate, Curve, Distances, QuantizedRates
from robustkit.records.training import EpochRow

__all__ = [
    "NORMS",
    "SCHEMA",
    "Adaptive",
    "Audit",
    "CertifiedRate",
    "Corruptions",
    "Curve",
    "Distances",
    "EpochRow",
    "Filtered",
    "Flag",
    "GateResult",
    "GateVerdict",
    "Latency",
    "LayerSparsity",
    "Paired",
    "Poisoning",
    "QuantizedRates",
    "Rate",
    "Results",
    "Severity",
    "StepFailure",
    "Timing",
    "Tolerance",
    "VariantResult",
    "printable",
    "read_results",
    "write_results",
]

SCHEMA = 1
NORMS = ("linf", "l2", "l1", "l0")


class VariantResult(Record):
    """One variant under one seed."""

    name: Name
    seed: Count
    parent: Name | None = None
    teacher: Name | None = None
    """The variant whose answers it was trained on."""
    members: list[Name] = Field(default_factory=list)
    """The variants that answer beside it."""
    depth: Annotated[int, Field(ge=0, le=1000)] = 0
    method: Text = ""
    """What was done, in words: defenses and compression with their parameters."""
    clean: Rate
    attacks: dict[Name, Rate] = Field(default_factory=dict)
    worst: Rate
    certified: dict[Name, CertifiedRate] = Field(default_factory=dict)
    """By the certificate's label: a lower bound beside `worst`, which is an upper one."""
    corruptions: Corruptions | None = None
    poisoning: Poisoning | None = None
    """Where the training data are poisoned."""
    tolerance: Tolerance | None = None
    """Of a `partition_ensemble`."""
    audit: Audit | None = None
    """With `evaluate.audit`: AutoAttack-standard on a random subset of what every attack left."""
    adaptive: Adaptive | None = None
    """Of a variant with inference wrappers; `worst` counts both ways."""
    quantized: QuantizedRates | None = None
    """Of a quantized variant (`int8`)."""
    versus_parent: Paired | None = None
    """Worst-case accuracy against the parent's, paired."""
    per_class: dict[Name, dict[Name, Share]] = Field(default_factory=dict)
    """{"clean": {class: accuracy}, "worst": {class: accuracy}}"""
    curves: list[Curve] = Field(default_factory=list)
    distances: dict[Name, Distances] = Field(default_factory=dict)
    """Of the minimum-norm attacks, by label."""
    parameters: Count
    nonzero: Count
    bytes: Count
    gzip_bytes: Count
    macs: Count
    activation_bytes: Count | None = None
    """The most that one image's forward holds at once, the image included, weights not."""
    channels: Count | None = None
    zero_channels: Count | None = None
    """Of the output channels of convolutions and linear layers: those that have no weight left."""
    latency_ms: dict[Name, Amount] = Field(default_factory=dict)
    """Medians: {"batch_1": ms, "batch_256": ms}"""
    latency: dict[Name, Latency] = Field(default_factory=dict)
    runtime: Name = "eager"
    """What `latency` is of: what the variant's file is for."""
    timings: list[Timing] = Field(default_factory=list)
    """With `evaluate.latency: full` or a list of runtimes."""
    sparsity: Share = 0.0
    layers: list[LayerSparsity] = Field(default_factory=list)
    epochs: list[EpochRow] = Field(default_factory=list)
    best_epoch: Count | None = None
    flags: list[Flag] = Field(default_factory=list)
    notes: list[Text] = Field(default_factory=list)
    cost_notes: list[Text] = Field(default_factory=list)
    """Of a compressed variant: what was done brought in size and speed, as measured."""
    forwards: Count = 0
    backwards: Count = 0
    seconds: Amount = 0.0
    train_seconds: Amount = 0.0
    pareto: bool = False
    """Whether it is on the front of `worst` and `gzip_bytes`."""
    fronts: list[Name] = Field(default_factory=list)
    """The costs (`bytes`, `gzip_bytes`, `nonzero`, `macs`, `latency`) on whose Pareto front with `worst` it is."""
    arrays: Name | None = None
    """Path, relative to the run folder, of the npz with bool arrays `correct/<attack>`, `correct/clean`,
    `correct/worst` and float arrays `distance/<attack>` of minimum-norm attacks, one entry a test example."""
    gallery: Name | None = None
    """Path, relative to the run folder, of the npz with clean (N, C, H, W) uint8, adversarial float32, label,
    prediction_clean, prediction_adversarial, confidence_clean, confidence_adversarial, norm."""
    model: Name | None = None
    """Path, relative to the run folder, of the model's file."""


class Results(Record):
    """A whole run."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: Name = ""
    threat: dict[str, Any] = Field(default_factory=dict)
    classes: list[Name] = Field(default_factory=list)
    variants: list[VariantResult]
    gates: list[GateResult] = Field(default_factory=list)
    failures: list[StepFailure] = Field(default_factory=list)
    provenance: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("schema_")
    @classmethod
    def _known(cls, value: int) -> int:
        if value > SCHEMA:
            raise ValueError(f"schema {value} is of a later robustkit, this one reads {SCHEMA}; update robustkit")
        return value

    @field_validator("threat")
    @classmethod
    def _whole(cls, value: dict[str, Any]) -> dict[str, Any]:
        eps = value.get("eps")
        known = isinstance(eps, int | float) and 0 <= eps <= 1e15 and value.get("norm") in NORMS
        if value and not known:
            raise ValueError(f"a threat has a norm ({', '.join(NORMS)}) and an eps, a number from 0")
        return value


def write_results(results: Results, path: Path) -> None:
    """Write results.json."""
    path.write_text(results.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Read results.json; a broken or foreign file is a UsageError that names it."""
    from pydantic import ValidationError

    from robustkit.errors import UsageError

    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = one_line(f"{where}: {first['msg'].removeprefix('Value error, ')}")
        raise UsageError(f"{path}: not a results.json that robustkit can read: {message}") from error
