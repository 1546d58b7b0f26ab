"""What a run found, as it stands in results.json (schema 1): later versions add keys and rename none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
Severity = Literal["wrong", "doubt", "note"]


class Record(BaseModel):
    """Base of the records: keys that a later version added are kept."""

    model_config = ConfigDict(extra="allow")


class Rate(Record):
    """An accuracy as a fraction of 1, with its 95 % Clopper-Pearson interval over n examples."""

    value: float
    low: float
    high: float
    n: int


class Flag(Record):
    """A doubt about a figure: `wrong` (must not be quoted), `doubt`, or `note`; the message says what to do next."""

    id: str
    severity: Severity
    message: str


class Paired(Record):
    """Difference to the parent on the same examples, in fractions of 1, with the exact McNemar p-value."""

    difference: float
    low: float
    high: float
    p: float
    lost: int
    gained: int


class Curve(Record):
    """A security curve: worst-case accuracy of one attack at growing eps."""

    attack: str
    norm: str
    eps: list[float]
    rates: list[Rate]


class Latency(Record):
    """Milliseconds a batch: median, quartiles and 95th percentile over `runs` interleaved runs."""

    median: float
    q1: float
    q3: float
    p95: float
    runs: int


class LayerSparsity(Record):
    """Zeros of one weight tensor."""

    name: str
    size: int
    zeros: int


class EpochRow(Record):
    """One epoch of training, as in epochs.jsonl. Accuracies are fractions of 1."""

    epoch: int
    loss: float
    train_accuracy: float
    validation_loss: float | None = None
    """Cross-entropy on the validation split; `clean` and `robust` are accuracies on it."""
    clean: float
    robust: float | None = None
    test_loss: float | None = None
    """With `train.monitor_test`: loss and accuracy on the test split, which nothing is chosen by."""
    test_accuracy: float | None = None
    seconds: float = 0.0


class VariantResult(Record):
    """One variant under one seed."""

    name: str
    seed: int
    parent: str | None = None
    depth: int = 0
    method: str = ""
    """What was done, in words: defenses and compression with their parameters."""
    clean: Rate
    attacks: dict[str, Rate] = Field(default_factory=dict)
    worst: Rate
    versus_parent: Paired | None = None
    """Worst-case accuracy against the parent's, paired."""
    per_class: dict[str, dict[str, float]] = Field(default_factory=dict)
    """{"clean": {class: accuracy}, "worst": {class: accuracy}}"""
    curves: list[Curve] = Field(default_factory=list)
    parameters: int
    nonzero: int
    bytes: int
    gzip_bytes: int
    macs: int
    latency_ms: dict[str, float] = Field(default_factory=dict)
    """Medians: {"batch_1": ms, "batch_256": ms}"""
    latency: dict[str, Latency] = Field(default_factory=dict)
    sparsity: float = 0.0
    layers: list[LayerSparsity] = Field(default_factory=list)
    epochs: list[EpochRow] = Field(default_factory=list)
    best_epoch: int | None = None
    flags: list[Flag] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    pareto: bool = False
    arrays: str | None = None
    """Path, relative to the run folder, of the npz with bool arrays `correct/<attack>`, `correct/clean`,
    `correct/worst`, one entry a test example."""
    gallery: str | None = None
    """Path, relative to the run folder, of the npz with clean (N, C, H, W) uint8, adversarial float32, label,
    prediction_clean, prediction_adversarial, confidence_clean, confidence_adversarial, norm."""


GateVerdict = Literal["holds", "holds (within noise)", "fails (within noise)", "fails"]


class GateResult(Record):
    """One gate: what was asked, the two sides as measured, and the verdict."""

    text: str
    left: float
    right: float
    verdict: GateVerdict
    confident: bool = False

    @property
    def holds(self) -> bool:
        """Whether the run passes this gate."""
        return self.verdict == "holds" or (not self.confident and self.verdict == "holds (within noise)")


class StepFailure(Record):
    """A step that failed: of which variant (none for the latency of all) and seed, what it did, and why."""

    variant: str = ""
    seed: int = 0
    step: str
    message: str


class Results(Record):
    """A whole run."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: str = ""
    threat: dict[str, Any] = Field(default_factory=dict)
    classes: list[str] = Field(default_factory=list)
    variants: list[VariantResult]
    gates: list[GateResult] = Field(default_factory=list)
    failures: list[StepFailure] = Field(default_factory=list)
    provenance: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(extra="allow", populate_by_name=True)


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
        raise UsageError(f"{path}: not a results.json of robustkit: {where}: {first['msg']}") from error
