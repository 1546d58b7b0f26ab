"""What a run found, as it stands in results.json (schema 1): later versions add keys and rename none."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

SCHEMA = 1
Severity = Literal["wrong", "doubt", "note"]
NORMS = ("linf", "l2", "l1", "l0")
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(value: object, keep: str = "\t\n") -> object:
    """Return a text without what would steer a terminal or turn the direction of writing; anything else as it is."""
    if not isinstance(value, str):
        return value
    return "".join(
        letter
        for letter in value
        if letter in keep or (unicodedata.category(letter) not in ("Cc", "Cs") and letter not in BIDI)
    )


def _name(value: object) -> object:
    return printable(value, keep="")


def _number(value: object) -> object:
    # JSON has no NaN: what was not finite is written as null.
    return math.nan if value is None else value


LARGEST = 2**63 - 1
Name = Annotated[str, BeforeValidator(_name)]
Text = Annotated[str, BeforeValidator(printable)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Loss = Annotated[float, Field(allow_inf_nan=True)]
Measured = Annotated[Loss, BeforeValidator(_number)]


class Record(BaseModel):
    """Base of the records: keys that a later version added are kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Rate(Record):
    """An accuracy as a fraction of 1, with its 95 % Clopper-Pearson interval over n examples."""

    value: Share
    low: Share
    high: Share
    n: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("an accuracy lies outside of its own interval")
        return self


class Flag(Record):
    """A doubt about a figure: `wrong` (must not be quoted), `doubt`, or `note`; the message says what to do next."""

    id: Name
    severity: Severity
    message: Text


class Paired(Record):
    """Difference to the parent on the same examples, in fractions of 1, with the exact McNemar p-value."""

    difference: Difference
    low: Difference
    high: Difference
    p: Share
    lost: Count
    gained: Count


class Curve(Record):
    """A security curve: worst-case accuracy of one attack at growing eps."""

    attack: Name
    norm: Name
    eps: list[Amount]
    rates: list[Rate]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.eps) != len(self.rates):
            raise ValueError(f"a curve has {len(self.eps)} eps and {len(self.rates)} rates")
        return self


class Audit(Record):
    """AutoAttack-standard on a random subset of what the attacks left: `broken` of `examined` fell.

    `low`, `high`: exact 95 % bounds on how many of all `survivors` (of `n` examples) would.
    """

    n: Count
    survivors: Count
    examined: Count
    broken: Count
    low: Count
    high: Count
    forwards: Count
    backwards: Count
    seconds: Amount

    def __str__(self) -> str:
        least, most = (self.survivors - self.high) / max(1, self.n), (self.survivors - self.low) / max(1, self.n)
        return (
            f"audit: AutoAttack breaks {self.broken} of {self.examined} survivors; on all {self.survivors} robust "
            f"accuracy would be {least:.1%} to {most:.1%}"
        )


class Distances(Record):
    """How far away one minimum-norm attack found adversarial images: the whole security curve from one run."""

    norm: Name
    median: Amount | None
    """The eps at which half of the examples are fooled; none where fewer were."""
    found: Share
    """Of the examples that are right without an attack."""
    n: Count
    eps: list[Amount]
    accuracy: list[Share]
    """At each eps: the share of the n examples whose distance is larger."""

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.eps) != len(self.accuracy):
            raise ValueError(f"distances have {len(self.eps)} eps and {len(self.accuracy)} accuracies")
        return self


class CertifiedRate(Rate):
    """Certified accuracy: a lower bound of robust accuracy within the threat, with its interval over examples."""

    smoothed: bool = False
    """Whether it is about the smoothed classifier, and not about the model that the attacks are on."""
    clean: Rate | None = None
    """Accuracy without an adversary of the classifier that is certified; abstaining is wrong."""
    abstained: Count = 0
    radius: Amount = 0.0
    """Median over all examples of how far around each the label is certain, in the certificate's own norm."""
    forwards: Count = 0
    seconds: Amount = 0.0


class Adaptive(Record):
    """Worst-case accuracy of a variant with inference wrappers: attacked as deployed, and through its honest view."""

    naive: Rate
    adaptive: Rate

    def __str__(self) -> str:
        survives = self.adaptive.value / self.naive.value if self.naive.value else 1.0
        return (
            f"inference wrapper: {self.naive.value:.1%} withstand attacks on it as deployed, {self.adaptive.value:.1%} "
            f"adaptive ones (BPDA, EOT); {min(1.0, survives):.0%} of its robustness survives"
        )


class QuantizedRates(Record):
    """A quantized variant: what it was made with, and accuracy under each way to attack it; `worst` counts all."""

    bits: Count
    trained: bool = False
    """Whether it was trained with fake quantization."""
    calibration_images: Count
    calibration_sha256: Name
    """Of the training images that gave the ranges of activations, as uint8 (N, C, H, W)."""
    surrogate: Rate
    """Under the recipe's attacks, on the surrogate with straight-through gradients."""
    transfer: Rate
    """Under images that fooled the float models."""
    union: Rate
    """Under both, and under Square on the quantized model itself."""
    queries: Count
    """Of Square, an example."""
    sets: Count
    """How many sets of images of float models were tried."""
    disagreeing: Count
    """Clean test images that the surrogate classifies otherwise."""

    def __str__(self) -> str:
        return (
            f"{self.bits} bits: {self.surrogate.value:.1%} withstand attacks on the straight-through surrogate, "
            f"{self.transfer.value:.1%} images of the float models, {self.union.value:.1%} both and Square "
            f"({self.queries} queries) on the quantized model; ranges from {self.calibration_images} training images, "
            f"sha256 {self.calibration_sha256[:16]}"
        )


class Corruptions(Record):
    """Accuracy under common corruptions: the mean of all, and severities 1 to 5 by corruption."""

    mean: Rate
    by: dict[Name, list[Share]] = Field(default_factory=dict)


class Filtered(Record):
    """What one data defense removed from poisoned training data, against what was poisoned."""

    defense: Name
    removed: Count
    poisoned: Count
    """Poisoned examples before it."""
    hits: Count
    """Poisoned examples among the removed."""
    precision: Share | None
    """hits / removed; none where nothing was removed."""
    recall: Share | None
    """hits / poisoned; none where nothing was poisoned."""


class Poisoning(Record):
    """What poisoned training data did: the attack success rate, and what the variant's own defenses removed."""

    success: Rate
    """Share of the triggered test images, without those of the target, that are taken for the target."""
    poisoned: Count | None = None
    """Poisoned examples in the training split; none for a variant that was not trained."""
    left: Count | None = None
    """Poisoned examples that it was trained on."""
    filters: list[Filtered] = Field(default_factory=list)


class Tolerance(Record):
    """Accuracy of a vote that is certain whatever so many poisons do: an example each, added, removed or relabelled."""

    members: Count
    poisons: list[Count]
    accuracy: list[Rate]
    """At each number of poisons: the share of test images that are right and stay so."""


class Latency(Record):
    """Milliseconds a batch: median, quartiles and 95th percentile over `runs` interleaved runs."""

    median: Amount
    q1: Amount
    q3: Amount
    p95: Amount
    runs: Count


class Timing(Latency):
    """Latency of one batch size in one runtime with so many threads, beside that of the parent or the first variant."""

    runtime: Name
    """`eager`, `inductor` or `onnxruntime`."""
    threads: Count
    batch: Count
    versus: Name | None = None
    """The variant that it is compared with; none for the first."""
    ratio: Amount | None = None
    """That variant's median over this one's: 2 is twice as fast."""
    distinguishable: bool | None = None
    """Whether the two ranges from the first to the third quartile lie apart; else nothing is said by the ratio."""


class LayerSparsity(Record):
    """Zeros of one weight tensor."""

    name: Name
    size: Count
    zeros: Count


class EpochRow(Record):
    """One epoch of training, as in epochs.jsonl. Accuracies are fractions of 1."""

    epoch: Count
    loss: Measured
    train_accuracy: Share
    validation_loss: Loss | None = None
    """Cross-entropy on the validation split; `clean` and `robust` are accuracies on it."""
    clean: Share
    robust: Share | None = None
    test_loss: Loss | None = None
    """With `train.monitor_test`: loss and accuracy on the test split, which nothing is chosen by."""
    test_accuracy: Share | None = None
    single_step: Share | None = None
    """Accuracy on the validation split under one step, beside `robust` under many: a gap is a collapse."""
    margin: Difference | None = None
    """Mean margin beside `robust`: the best wrong class's probability minus the right one's; lower is better."""
    lr: float | None = None
    """Learning rate of the first parameter group at the epoch's end."""
    seconds: Amount = 0.0


class VariantResult(Record):
    """One variant under one seed."""

    name: Name
    seed: Count
    parent: Name | None = None
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
    arrays: Name | None = None
    """Path, relative to the run folder, of the npz with bool arrays `correct/<attack>`, `correct/clean`,
    `correct/worst` and float arrays `distance/<attack>` of minimum-norm attacks, one entry a test example."""
    gallery: Name | None = None
    """Path, relative to the run folder, of the npz with clean (N, C, H, W) uint8, adversarial float32, label,
    prediction_clean, prediction_adversarial, confidence_clean, confidence_adversarial, norm."""
    model: Name | None = None
    """Path, relative to the run folder, of the model's file."""


GateVerdict = Literal["holds", "holds (within noise)", "fails (within noise)", "fails"]


class GateResult(Record):
    """One gate: what was asked, the two sides as measured, and the verdict."""

    text: Text
    left: Measured
    right: Measured
    verdict: GateVerdict
    confident: bool = False

    @property
    def holds(self) -> bool:
        """Whether the run passes this gate."""
        return self.verdict == "holds" or (not self.confident and self.verdict == "holds (within noise)")


class StepFailure(Record):
    """A step that failed: of which variant (none for the latency of all) and seed, what it did, and why."""

    variant: Name = ""
    seed: Count = 0
    step: Name
    message: Text


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
        message = _name(f"{where}: {first['msg'].removeprefix('Value error, ')}")
        raise UsageError(f"{path}: not a results.json that robustkit can read: {message}") from error
