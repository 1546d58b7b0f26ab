"""Certified accuracy: a lower bound beside the upper one that attacks give, and the check that the two agree."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import registry, stats
from robustkit.attacks.threat import Threat
from robustkit.certificates.certificate import ABSTAINED, Certificate, Certified
from robustkit.errors import InternalError, UsageError
from robustkit.evaluation.asked import Model, as_module, checked_examples
from robustkit.evaluation.attacked import Progress, as_images, clean_outcome, device_of
from robustkit.evaluation.evaluation import Evaluation
from robustkit.evaluation.undisturbed import undisturbed
from robustkit.results import Rate
from robustkit.seeding import derive_seed

CertificateSpec = str | Mapping[str, Mapping[str, Any] | None] | Certificate
NAMED = 10
"""So many examples that contradict a certificate are named."""


@dataclass
class CertifiedOutcome:
    """What one certificate says of one classifier: one entry an example, in the order of the test data."""

    certified: NDArray[np.bool_]
    """The label is predicted on the whole ball."""
    prediction: NDArray[np.int64]
    """-1 where the certificate abstained."""
    radius: NDArray[np.float32]
    labels: NDArray[np.int64]
    smoothed: bool
    """Whether it is about the smoothed classifier, and not about the model that is attacked."""
    forwards: int
    seconds: float

    @property
    def rate(self) -> Rate:
        """Certified accuracy with its interval over examples."""
        return stats.clopper_pearson(int(self.certified.sum()), int(self.certified.size))

    @property
    def clean(self) -> Rate:
        """Accuracy without an adversary of the classifier that is certified; abstaining is wrong."""
        return stats.clopper_pearson(int((self.prediction == self.labels).sum()), int(self.labels.size))

    @property
    def median_radius(self) -> float:
        """Median of how far around each example its label is certain, in the certificate's own norm."""
        right = np.where(self.prediction == self.labels, self.radius, 0.0)
        return float(np.median(right)) if right.size else 0.0

    @property
    def abstained(self) -> int:
        """Examples for which no class was found."""
        return int((self.prediction == ABSTAINED).sum())


def certified_outcome(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    certificate: Certificate,
    threat: Threat,
    *,
    seed: int,
    label: str,
    batch_size: int,
    device: torch.device,
    on_progress: Progress | None = None,
) -> CertifiedOutcome:
    """Return what a certificate says of every example; labels must be classes of the model.

    Random numbers come from (seed, label), the same for each batch: robustkit's own certificates mix the pixels of each
    example into them, so that batch size and order do not matter.
    """
    started = time.perf_counter()
    threat = threat.to(device)
    found: list[Certified] = []
    with undisturbed(model), torch.no_grad():
        for first in range(0, len(y), batch_size):
            index = torch.arange(first, min(first + batch_size, len(y)))
            images = as_images(x[index.to(x.device)].to(device))
            labels = y[index.to(y.device)].to(device)
            place = "cpu" if device.type == "meta" else device
            generator = torch.Generator(device=place).manual_seed(derive_seed(seed, label))
            found.append(certificate(model, images, labels, threat.select(index.to(device)), generator=generator))
            if on_progress is not None:
                on_progress(min(first + batch_size, len(y)), len(y))
    return CertifiedOutcome(
        certified=torch.cat([one.certified for one in found]).cpu().numpy().astype(bool),
        prediction=torch.cat([one.prediction for one in found]).cpu().numpy(),
        radius=torch.cat([one.radius for one in found]).cpu().numpy().astype(np.float32),
        labels=y.cpu().numpy(),
        smoothed=certificate.smoothed,
        forwards=sum(one.forwards for one in found),
        seconds=time.perf_counter() - started,
    )


def check_sound(certified: Mapping[str, NDArray[np.bool_]], correct: Mapping[str, NDArray[np.bool_]]) -> None:
    """Compare certificates of a model with attacks on the same model under the same threat, example by example.

    `certified` and `correct` (N,) by label; `correct` may hold `clean`, as the image itself lies in its ball.
    Certificates of the smoothed classifier do not belong here: an attack on the model says nothing about it.

    Raises:
        InternalError: an example that is certified is wrong under an attack; the message names the examples.
    """
    problems = []
    for certificate, proven in certified.items():
        for attack, right in correct.items():
            broken = np.flatnonzero(proven & ~right)
            if broken.size:
                shown = ", ".join(map(str, broken[:NAMED])) + (", ..." if broken.size > NAMED else "")
                problems.append(
                    f"{certificate} certifies {broken.size} examples that {attack} breaks (numbers in the test data, "
                    f"from 0: {shown})"
                )
    if problems:
        raise InternalError(
            f"internal error: {'; '.join(problems)}. Either the certificate or the attack is wrong, so no figure of "
            "this model can be trusted; please report it with the recipe"
        )


@dataclass(repr=False)
class Certification:
    """Certified accuracies with 95 % intervals, and what each certificate says of every example."""

    clean: Rate
    certified: dict[str, Rate]
    outcomes: dict[str, CertifiedOutcome]
    threat: Threat

    def __repr__(self) -> str:
        width = max(len(name) for name in ("clean", *self.certified))
        eps = "one eps an example" if isinstance(self.threat.eps, Tensor) else f"eps {self.threat.eps:.4g}"
        lines = [f"certified accuracy of {self.clean.n} examples, {self.threat.norm} {eps}, 95 % intervals"]
        for name, rate in [("clean", self.clean), *self.certified.items()]:
            outcome = self.outcomes.get(name)
            of = f"  of the smoothed classifier, {outcome.abstained} abstained" if outcome and outcome.smoothed else ""
            lines.append(f"  {name:{width}}  {rate.value:7.2%}  [{rate.low:.2%}, {rate.high:.2%}]{of}")
        return "\n".join(lines)


def certify(
    model: Model,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    *,
    threat: Threat,
    certificates: Sequence[CertificateSpec] | str = ("interval",),
    against: Evaluation | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Certification:
    """Return the share of examples that no adversary within the threat can change: a lower bound of robust accuracy.

    `model`, x, y, `threat` and `batch_size` as in `robustkit.evaluate`. `certificates`: names, `{name: parameters}`
    (with `as` for a label), or objects with the Certificate protocol. `against`: what `robustkit.evaluate` found for
    the same model, images and threat; the two are then held against each other, example by example.

    Raises:
        UsageError: images outside [0, 1], labels that do not fit, an unknown certificate or parameter.
        ModelError: the certificate does not know a layer of the model; the message names it.
        InternalError: an attack in `against` broke an example that is certified.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    with torch.inference_mode(False):
        images, labels = checked_examples(x, y, threat)
        module = as_module(model)
        device = device_of(module, images.device)
        clean = clean_outcome(module, images, labels, batch_size=batch_size, device=device)
        outcomes = {
            label: certified_outcome(
                module,
                images,
                labels,
                certificate,
                threat,
                seed=seed,
                label=label,
                batch_size=batch_size,
                device=device,
            )
            for label, certificate in make_certificates(certificates).items()
        }
    proven = {label: one.certified for label, one in outcomes.items() if not one.smoothed}
    check_sound(proven, {"clean": clean.correct, **(_attacked(against, threat, clean.correct) if against else {})})
    return Certification(clean.rate, {label: one.rate for label, one in outcomes.items()}, outcomes, threat)


def _attacked(against: Evaluation, threat: Threat, clean: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    same = against.threat.norm == threat.norm and _equal(against.threat.eps, threat.eps)
    if not same or against.correct.shape != clean.shape:
        raise UsageError("`against` is an evaluation of other examples, or under another threat")
    return {label: one.correct for label, one in against.outcomes.items()}


def _equal(one: float | Tensor, other: float | Tensor) -> bool:
    return bool(torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu()))


def make_certificates(specs: Sequence[CertificateSpec] | str) -> dict[str, Certificate]:
    """Return {label: certificate} for names, `{name: parameters}` and objects.

    Raises:
        UsageError: an unknown name or parameter, or two certificates with one label.
    """
    made: dict[str, Certificate] = {}
    for item in [specs] if isinstance(specs, str | Mapping) else specs:
        label, certificate = _one(item)
        if label in made or label == "clean":
            raise UsageError(f"two certificates are called {label!r}; give one another label: {{name: {{'as': ...}}}}")
        made[label] = certificate
    return made


def _one(item: CertificateSpec) -> tuple[str, Certificate]:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping):
        if not callable(item):
            raise UsageError(f"{item!r} is no certificate: a name, {{name: parameters}} or a callable is needed")
        return type(item).__name__.lower(), item
    if len(item) != 1:
        raise UsageError("a certificate is written {name: parameters}, one name each")
    name, given = next(iter(item.items()))
    values = dict(given or {})
    label = str(values.pop("as", name))
    entry = registry.find("certificate", name)
    clean, mistakes = registry.check_parameters(entry, values)
    if mistakes:
        raise UsageError(f"certificate {name}: " + "; ".join(message for _, message in mistakes))
    made: Certificate = registry.create(entry, clean)
    return label, made
