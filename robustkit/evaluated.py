"""Everything that the store holds of one variant under one seed. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.recipe.plan import Plan, Step
from robustkit.results import CertifiedRate, Rate
from robustkit.store import Store

Bools = NDArray[np.bool_]
OUTCOME = "outcome.npz"
CERTIFIED = "certified.npz"


@dataclass
class Evaluated:
    """Everything that the store holds of one variant under one seed."""

    variant: str
    seed: int
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Records by kind of step (fit, measure, clean, curve, checks)."""
    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Records by the attack's label."""
    certified: dict[str, CertifiedRate] = field(default_factory=dict)
    """By the certificate's label."""
    proven: dict[str, Bools] = field(default_factory=dict)
    """Which examples are certified, by the certificate's label."""
    correct: dict[str, Bools] = field(default_factory=dict)
    """Per-example correctness: `clean`, each attack's label, and `worst`."""
    distances: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Per-example distances of the minimum-norm attacks, by label."""
    ways: list[tuple[Bools, Bools]] = field(default_factory=list)
    """Of each attack on a variant with inference wrappers: right as deployed, and right through the view."""
    beside: dict[str, Bools] = field(default_factory=dict)
    """Of a quantized variant: right under `transfer` of the float models' images, and not fooled by queries (`square`),
    which go to what all else leaves."""
    surrogate: Bools | None = None
    """Right under every attack of the recipe; of a quantized variant they are attacks on its surrogate."""
    radius: NDArray[np.int64] | None = None
    """How many poisons a vote tolerates, -1 where it is wrong without any."""
    fooled: Bools | None = None
    """Which of the triggered test images are taken for the target of the poison."""
    labels: NDArray[np.int64] | None = None

    def rates(self) -> dict[str, Rate]:
        """Return the accuracy of each entry of `correct` with its interval."""
        return {name: rate_of(values) for name, values in self.correct.items()}


def rate_of(correct: Bools) -> Rate:
    """Return the share of correct examples with its Clopper-Pearson interval."""
    return stats.clopper_pearson(int(correct.sum()), int(correct.size))


def collect(plan: Plan, store: Store, variant: str, seed: int) -> Evaluated | None:
    """Return what the store holds of a variant under a seed; None until it has a model and its clean accuracy."""
    found = Evaluated(variant, seed)
    for step in plan.of(variant, seed):
        record = store.record(step.key)
        if record is None:
            continue
        if step.kind == "attack" and step.use is not None:
            found.attacks[step.use.label] = record
            arrays = _arrays(store, step)
            found.correct[step.use.label] = arrays["correct"]
            if "naive" in arrays:
                found.ways.append((arrays["naive"], arrays["adaptive"]))
            if "minimal_distance" in arrays:
                found.distances[step.use.label] = arrays["minimal_distance"]
        elif step.kind == "certify" and step.use is not None:
            proven = store.read_arrays(step.key, CERTIFIED)["certified"]
            found.proven[step.use.label] = proven
            found.certified[step.use.label] = _certified(record, proven)
        else:
            found.records[step.kind] = record
        if step.kind == "tolerance":
            arrays = _arrays(store, step)
            found.radius = np.where(arrays["right"], arrays["radius"], -1)
        if step.kind == "artefact":
            arrays = _arrays(store, step)
            found.beside = {name: arrays[name] for name in ("transfer", "square")}
        if step.kind == "success":
            found.fooled = _arrays(store, step)["fooled"]
        if step.kind == "clean":
            arrays = _arrays(store, step)
            found.correct["clean"] = arrays["correct"]
            found.labels = arrays["labels"]
    if not {"fit", "measure", "clean"} <= set(found.records):
        return None
    order = {"clean": found.correct["clean"], **found.correct}
    found.surrogate = stats.worst_case(order.values())
    found.correct = {**order, "worst": stats.worst_case([*order.values(), *found.beside.values()])}
    return found


def _certified(record: Mapping[str, Any], proven: Bools) -> CertifiedRate:
    values = {name: record[name] for name in ("smoothed", "clean", "abstained", "radius", "forwards", "seconds")}
    return CertifiedRate.model_validate({**rate_of(proven).model_dump(), **values})


def _arrays(store: Store, step: Step) -> dict[str, NDArray[Any]]:
    return store.read_arrays(step.key, OUTCOME)
