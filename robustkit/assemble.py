"""From finished steps to results: rows, per-example arrays, gallery, gates. Reads the store only; imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.evaluation.compare import audit_flags, budget_flags, compare_flags, finite_flags, subset_flags
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.reporting import curve_flags, default_of, same_attack_flags, training_of
from robustkit.evaluation.rules import silent_flags
from robustkit.evaluation.ways import adaptive_notes, adaptive_of
from robustkit.missing import attack_flags, failed_gate, failures_of, latency_key, undecided, unsound_flags
from robustkit.recipe.gates import Correct, Gate, evaluate_gate, parse_gate
from robustkit.recipe.plan import Plan, Step, describe_variant
from robustkit.recipe.spec import Recipe
from robustkit.report.pareto import mark_pareto
from robustkit.results import Audit, CertifiedRate, Corruptions, Curve, Flag, Paired, Rate, Results, VariantResult
from robustkit.store import Store, write_npz

Bools = NDArray[np.bool_]
OUTCOME = "outcome.npz"
GALLERY = "gallery.npz"
CERTIFIED = "certified.npz"
Identity = tuple[str, int]


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
    labels: NDArray[np.int64] | None = None

    def rates(self) -> dict[str, Rate]:
        """Return the accuracy of each entry of `correct` with its interval."""
        return {name: rate_of(values) for name, values in self.correct.items()}


def rate_of(correct: Bools) -> Rate:
    """Return the share of correct examples with its Clopper-Pearson interval."""
    return stats.clopper_pearson(int(correct.sum()), int(correct.size))


def assemble(plan: Plan, store: Store, provenance: Mapping[str, Any], failed: Mapping[str, str]) -> Results:
    """Return the results of every variant whose clean accuracy is in the store, with gates judged.

    `failed`: what the steps that failed said, by their keys.
    """
    recipe = plan.recipe
    evaluated: dict[Identity, Evaluated] = {}
    classes: list[str] = []
    for seed in recipe.seeds:
        for variant in recipe.variants:
            found = _collect(plan, store, variant.label, seed)
            if found is not None:
                evaluated[variant.label, seed] = found
                classes = classes or list(found.records["measure"].get("classes", []))
    latency = _latency(plan, store, failed)
    rows = [_row(plan, store, one, evaluated, latency, classes, failed) for one in evaluated.values()]
    results = Results(
        name=recipe.name,
        threat=_threat(recipe),
        classes=classes,
        variants=rows,
        failures=failures_of(plan, failed),
        provenance={**provenance, "data": {"name": recipe.data.name, "fingerprint": plan.data_fingerprint}},
    )
    results = mark_pareto(results)
    gates = [parse_gate(gate.text, gate.confident) for gate in recipe.gates]
    return with_gates(results, gates, _lookup(evaluated))


def _threat(recipe: Recipe) -> dict[str, Any]:
    """Return what the attacks had; results with another one are not compared."""
    found: dict[str, Any] = {"norm": recipe.threat.norm, "eps": recipe.threat.eps}
    return found | ({"quantize_input": True} if recipe.evaluate.quantize_input else {})


def with_gates(results: Results, gates: Sequence[Gate], correct: Correct) -> Results:
    """Return results with every gate judged, and a doubt where the examples are too few to tell."""
    judged = [
        failed_gate(gate) if undecided(gate, results) else evaluate_gate(gate, results, correct) for gate in gates
    ]
    doubts: dict[str, list[Flag]] = {}
    for gate, verdict in zip(gates, judged, strict=True):
        for _, variant in gate.references():
            rows = [row for row in results.variants if row.name == variant]
            doubts.setdefault(variant, []).extend(subset_flags([verdict], rows[0].worst.n) if rows else [])
    rows = [row.model_copy(update={"flags": [*row.flags, *doubts.get(row.name, [])]}) for row in results.variants]
    return results.model_copy(update={"gates": judged, "variants": rows})


def _lookup(evaluated: Mapping[Identity, Evaluated]) -> Correct:
    def correct(variant: str, seed: int, metric: str) -> Bools | None:
        found = evaluated.get((variant, seed))
        return (found.correct | found.proven).get(metric) if found else None

    return correct


def _collect(plan: Plan, store: Store, variant: str, seed: int) -> Evaluated | None:
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
        if step.kind == "clean":
            arrays = _arrays(store, step)
            found.correct["clean"] = arrays["correct"]
            found.labels = arrays["labels"]
    if not {"fit", "measure", "clean"} <= set(found.records):
        return None
    order = {"clean": found.correct["clean"], **found.correct}
    found.correct = {**order, "worst": stats.worst_case(order.values())}
    return found


def _certified(record: Mapping[str, Any], proven: Bools) -> CertifiedRate:
    values = {name: record[name] for name in ("smoothed", "clean", "abstained", "radius", "forwards", "seconds")}
    return CertifiedRate.model_validate({**rate_of(proven).model_dump(), **values})


def _arrays(store: Store, step: Step) -> dict[str, NDArray[Any]]:
    return store.read_arrays(step.key, OUTCOME)


def _latency(plan: Plan, store: Store, failed: Container[str]) -> dict[str, dict[str, Any]]:
    for step in plan.steps:
        if step.kind == "latency":
            record = store.record(latency_key(step, failed)) or {}
            found: dict[str, dict[str, Any]] = record.get("latency", {})
            return found
    return {}


def _row(
    plan: Plan,
    store: Store,
    one: Evaluated,
    evaluated: Mapping[Identity, Evaluated],
    latency: Mapping[str, dict[str, Any]],
    classes: list[str],
    failed: Mapping[str, str],
) -> VariantResult:
    variant = plan.recipe.variant(one.variant)
    fit, measure = one.records["fit"], one.records["measure"]
    rates = one.rates()
    # Latency is measured on the first seed's models; the other seeds have the same architecture.
    measured = latency.get(plan.fit_keys[one.variant, plan.recipe.seeds[0]], {})
    parent = evaluated.get((variant.parent, one.seed)) if variant.parent else None
    curves = _curves(plan, one)
    return VariantResult(
        name=one.variant,
        seed=one.seed,
        parent=variant.parent,
        depth=_depth(plan, one.variant),
        method=describe_variant(variant),
        clean=rates["clean"],
        attacks={label: rates[label] for label in one.attacks},
        worst=rates["worst"],
        certified=one.certified,
        corruptions=_corruptions(one),
        audit=_audit(one),
        adaptive=adaptive_of(one.correct["clean"], one.ways),
        versus_parent=_paired(parent, one),
        per_class=_per_class(one, classes),
        curves=curves,
        distances={
            label: MinimumDistances(plan.recipe.threat.norm, values).summary()
            for label, values in one.distances.items()
        },
        parameters=measure["parameters"],
        nonzero=measure["nonzero"],
        bytes=measure["bytes"],
        gzip_bytes=measure["gzip_bytes"],
        macs=measure["macs"],
        sparsity=measure["sparsity"],
        layers=measure["layers"],
        latency_ms={batch: values["median"] for batch, values in measured.items()},
        latency=measured,
        epochs=fit.get("epochs", []),
        best_epoch=fit.get("best_epoch"),
        flags=[
            *attack_flags(plan, one.variant, one.seed, one.attacks, failed),
            *unsound_flags(plan, one.variant, one.seed, failed),
            *_flags(plan, one),
            *curve_flags(curves, len(classes)),
        ],
        notes=[
            *fit.get("notes", []),
            *measure.get("notes", []),
            *_audited(one),
            *adaptive_notes(one.correct["clean"], one.ways),
        ],
        forwards=_total(one, "forwards"),
        backwards=_total(one, "backwards"),
        seconds=round(sum(float(record.get("seconds", 0)) for record in _outcomes(one)), 3),
        train_seconds=round(float(fit.get("train_seconds", 0.0)), 3),
        arrays=_write_arrays(store, one),
        gallery=_write_gallery(plan, store, one),
    )


def _depth(plan: Plan, label: str) -> int:
    parent = plan.recipe.variant(label).parent
    return 0 if parent is None else 1 + _depth(plan, parent)


def _outcomes(one: Evaluated) -> list[dict[str, Any]]:
    return [one.records["clean"], *one.attacks.values()]


def _total(one: Evaluated, name: str) -> int:
    return sum(int(record.get(name, 0)) for record in _outcomes(one))


def _paired(parent: Evaluated | None, child: Evaluated) -> Paired | None:
    if parent is None or set(parent.attacks) != set(child.attacks):
        return None
    return stats.paired(parent.correct["worst"], child.correct["worst"])


def _per_class(one: Evaluated, classes: list[str]) -> dict[str, dict[str, float]]:
    if one.labels is None:
        return {}
    found: dict[str, dict[str, float]] = {"clean": {}, "worst": {}}
    for number, name in enumerate(classes):
        members = one.labels == number
        if members.any():
            for which, values in found.items():
                values[name] = round(float(one.correct[which][members].mean()), 6)
    return found


def _curves(plan: Plan, one: Evaluated) -> list[Curve]:
    record = one.records.get("curve")
    if record is None:
        return []
    curves = []
    for name, correct in record["correct"].items():
        rates = [stats.clopper_pearson(count, record["n"]) for count in correct]
        curves.append(Curve(attack=name, norm=plan.recipe.threat.norm, eps=record["eps"], rates=rates))
    return curves


def _audited(one: Evaluated) -> list[str]:
    audit = _audit(one)
    return [str(audit)] if audit is not None else []


def _audit(one: Evaluated) -> Audit | None:
    record = one.records.get("audit")
    return Audit.model_validate({name: record[name] for name in Audit.model_fields}) if record else None


def _corruptions(one: Evaluated) -> Corruptions | None:
    record = one.records.get("corruptions")
    return Corruptions(mean=record["mean"], by=record["by"]) if record else None


def _flags(plan: Plan, one: Evaluated) -> list[Flag]:
    flags = [Flag.model_validate(flag) for flag in one.records["fit"].get("flags", [])]
    flags += [Flag.model_validate(flag) for flag in one.records.get("checks", {}).get("flags", [])]
    records = {"clean": one.records["clean"], **one.attacks}
    flags += finite_flags({label: int(record.get("not_finite", 0)) for label, record in records.items()})
    flags += silent_flags(
        {label: int(record.get("silent", 0)) for label, record in one.attacks.items()}, one.correct["clean"].size
    )
    flags += same_attack_flags(training_of(plan.recipe, one.variant), plan.recipe.evaluate.attacks, default_of)
    kinds = {use.label: use.name for use in plan.recipe.evaluate.attacks}
    flags += compare_flags(one.correct, kinds)
    flags += audit_flags(_audit(one))
    flags += budget_flags({label: int(record.get("projected", 0)) for label, record in one.attacks.items()})
    for label, record in one.attacks.items():
        flags += [Flag(id="attack-note", severity="note", message=f"{label}: {note}") for note in record["notes"]]
    return flags


def _write_arrays(store: Store, one: Evaluated) -> str:
    name = f"arrays/{one.variant}-seed{one.seed}.npz"
    arrays: dict[str, NDArray[Any]] = {f"correct/{key}": values for key, values in one.correct.items()}
    arrays |= {f"distance/{label}": values for label, values in one.distances.items()}
    arrays |= {f"certified/{key}": values for key, values in one.proven.items()}
    if one.labels is not None:
        arrays["labels"] = one.labels
    write_npz(store.folder / name, arrays)
    return name


def _write_gallery(plan: Plan, store: Store, one: Evaluated) -> str | None:
    """Take, for each example, the first attack that fools it, else the attack that lowers its confidence most."""
    found = []
    for label, record in one.attacks.items():
        if GALLERY in record["files"]:
            found.append(store.read_arrays(plan.attack_step(one.variant, one.seed, label).key, GALLERY))
    if not found:
        return None
    truth = found[0]["label"]
    fooled = np.stack([arrays["prediction_adversarial"] != truth for arrays in found])
    confidence = np.stack([arrays["confidence_adversarial"] for arrays in found])
    score = np.where(fooled, 2.0 + confidence, 1.0 - confidence)
    choice = score.argmax(axis=0)
    rows = np.arange(len(truth))
    chosen = {name: np.stack([arrays[name] for arrays in found])[choice, rows] for name in found[0]}
    delta = (chosen["adversarial"] - chosen["clean"].astype(np.float32) / 255).reshape(len(truth), -1)
    chosen["norm"] = np.linalg.norm(
        delta, ord={"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[plan.recipe.threat.norm], axis=1
    )
    name = f"arrays/{one.variant}-seed{one.seed}-gallery.npz"
    write_npz(store.folder / name, chosen)
    return name
