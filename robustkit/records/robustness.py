"""What attacks and certificates found."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from robustkit.records.accuracy import Rate
from robustkit.records.fields import Amount, Count, Name, Record, Share


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
