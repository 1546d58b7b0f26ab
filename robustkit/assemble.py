"""From finished steps to results: rows and gates. Reads the store only; imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from robustkit import stats
from robustkit.evaluated import Bools, Evaluated, collect
from robustkit.evaluation.compare import audit_flags, budget_flags, compare_flags, finite_flags, subset_flags
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.reporting import curve_flags, default_of, same_attack_flags, training_of
from robustkit.evaluation.rules import silent_flags
from robustkit.evaluation.ways import adaptive_notes, adaptive_of
from robustkit.honest import Made, cost_notes
from robustkit.judging import Correct, evaluate_gate, unmeasured
from robustkit.missing import attack_flags, failures_of, latency_key, undecided, unsound_flags
from robustkit.per_example import write_arrays, write_gallery
from robustkit.poisoning import poisoning_of, tolerance_of
from robustkit.quantizing import quantized_flags, quantized_notes, quantized_of
from robustkit.recipe.gates import Gate, parse_gate
from robustkit.recipe.plan import Plan, describe_use, describe_variant
from robustkit.recipe.spec import Recipe
from robustkit.report.pareto import mark_pareto
from robustkit.results import Audit, Corruptions, Curve, Flag, Paired, Results, VariantResult
from robustkit.speed import compared
from robustkit.store import ONNX, Store

Identity = tuple[str, int]


def assemble(plan: Plan, store: Store, provenance: Mapping[str, Any], failed: Mapping[str, str]) -> Results:
    """Return the results of every variant whose clean accuracy is in the store, with gates judged.

    `failed`: what the steps that failed said, by their keys.
    """
    recipe = plan.recipe
    evaluated: dict[Identity, Evaluated] = {}
    classes: list[str] = []
    for seed in recipe.seeds:
        for variant in recipe.variants:
            found = collect(plan, store, variant.label, seed)
            if found is not None:
                evaluated[variant.label, seed] = found
                classes = classes or list(found.records["measure"].get("classes", []))
    timed = _timed(plan, store, failed)
    rows = [_row(plan, store, one, evaluated, timed, classes, failed) for one in evaluated.values()]
    rows = _with_costs(plan, rows, evaluated, provenance)
    results = Results(
        name=recipe.name,
        threat=_threat(recipe),
        classes=classes,
        variants=rows,
        failures=failures_of(plan, failed),
        provenance={**provenance, "data": _data(plan)},
    )
    results = mark_pareto(results)
    gates = [parse_gate(gate.text, gate.confident, gate.every_seed) for gate in recipe.gates]
    return with_gates(results, gates, _lookup(evaluated))


def _data(plan: Plan) -> dict[str, str]:
    """Return which data the run was on."""
    recipe = plan.recipe
    planted = {"poison": describe_use(recipe.poison)} if recipe.poison else {}
    return {"name": recipe.data.name, "fingerprint": plan.data_fingerprint, **planted}


def _threat(recipe: Recipe) -> dict[str, Any]:
    """Return what the attacks had; results with another one are not compared."""
    found: dict[str, Any] = {"norm": recipe.threat.norm, "eps": recipe.threat.eps}
    return found | ({"quantize_input": True} if recipe.evaluate.quantize_input else {})


def with_gates(results: Results, gates: Sequence[Gate], correct: Correct) -> Results:
    """Return results with every gate judged, and a doubt where the examples are too few to tell."""
    judged = [unmeasured(gate) if undecided(gate, results) else evaluate_gate(gate, results, correct) for gate in gates]
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
        if found is None or metric == "success":
            return found.fooled if found else None
        return (found.correct | found.proven).get(metric)

    return correct


def _timed(plan: Plan, store: Store, failed: Container[str]) -> dict[str, Any]:
    step = next((one for one in plan.steps if one.kind == "latency"), None)
    return (store.record(latency_key(step, failed)) if step else None) or {}


def _with_costs(
    plan: Plan, rows: Sequence[VariantResult], evaluated: Mapping[Identity, Evaluated], provenance: Mapping[str, Any]
) -> list[VariantResult]:
    """Return the rows with their timings compared, and what compression brought in words."""
    rows, extensions = compared(rows), provenance.get("cpu", {}).get("extensions", ())

    def made(row: VariantResult) -> Made:
        quantized = evaluated[row.name, row.seed].records["fit"].get("quantization") or {}
        return Made(_compressed(plan, row.name), quantized.get("bits"), extensions)

    return [row.model_copy(update={"cost_notes": cost_notes(row, rows, made(row))}) for row in rows]


def _compressed(plan: Plan, label: str | None) -> list[str]:
    """Return the names of the methods that a variant and those that it descends from were compressed by."""
    found: list[str] = []
    while label is not None:
        variant = plan.recipe.variant(label)
        found += [use.name for use in variant.compress]
        label = variant.parent
    return found


def _row(
    plan: Plan,
    store: Store,
    one: Evaluated,
    evaluated: Mapping[Identity, Evaluated],
    timed: Mapping[str, Any],
    classes: list[str],
    failed: Mapping[str, str],
) -> VariantResult:
    variant = plan.recipe.variant(one.variant)
    fit, measure = one.records["fit"], one.records["measure"]
    rates = one.rates()
    # Latency is measured on the first seed's models; the other seeds have the same architecture.
    key, own = plan.fit_keys[one.variant, plan.recipe.seeds[0]], plan.fit_keys[one.variant, one.seed]
    file = store.model_name(own)
    measured = timed.get("latency", {}).get(key, {})
    untimed = timed.get("untimed", {}).get(key, {})
    parent = evaluated.get((variant.parent, one.seed)) if variant.parent else None
    curves = _curves(plan, one)
    return VariantResult(
        name=one.variant,
        seed=one.seed,
        parent=variant.parent,
        teacher=variant.teacher if variant.train else None,
        members=[label for named in variant.members.values() for label in named],
        depth=_depth(plan, one.variant),
        method=describe_variant(variant),
        clean=rates["clean"],
        attacks={label: rates[label] for label in one.attacks},
        worst=rates["worst"],
        certified=one.certified,
        corruptions=_corruptions(one),
        poisoning=poisoning_of(one.fooled, fit),
        tolerance=tolerance_of(one.radius, int(one.records.get("tolerance", {}).get("members", 0))),
        audit=_audit(one),
        adaptive=adaptive_of(one.correct["clean"], one.ways),
        quantized=quantized_of(one),
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
        activation_bytes=measure.get("activation_bytes"),
        channels=measure.get("channels"),
        zero_channels=measure.get("zero_channels"),
        sparsity=measure["sparsity"],
        layers=measure["layers"],
        latency_ms={batch: values["median"] for batch, values in measured.items()},
        latency=measured,
        runtime="onnxruntime" if file == ONNX else "eager",
        timings=timed.get("timings", {}).get(key, []),
        epochs=fit.get("epochs", []),
        best_epoch=fit.get("best_epoch"),
        flags=[
            *attack_flags(plan, one.variant, one.seed, one.attacks, failed),
            *unsound_flags(plan, one.variant, one.seed, failed),
            *_flags(plan, one),
            *quantized_flags(plan, one, parent, failed),
            *curve_flags(curves, len(classes)),
        ],
        notes=[
            *fit.get("notes", []),
            *(f"latency in {runtime} was not measured: {why}" for runtime, why in untimed.items()),
            *_audited(one),
            *adaptive_notes(one.correct["clean"], one.ways),
            *quantized_notes(one),
        ],
        forwards=_total(one, "forwards"),
        backwards=_total(one, "backwards"),
        seconds=round(sum(float(record.get("seconds", 0)) for record in _outcomes(one)), 3),
        train_seconds=round(float(fit.get("train_seconds", 0.0)), 3),
        arrays=write_arrays(store, one),
        gallery=write_gallery(plan, store, one),
        model=f"steps/{own}/{file}",
    )


def _depth(plan: Plan, label: str) -> int:
    parent = plan.recipe.variant(label).parent
    return 0 if parent is None else 1 + _depth(plan, parent)


def _outcomes(one: Evaluated) -> list[dict[str, Any]]:
    beside = [one.records["artefact"]] if "artefact" in one.records else []
    return [one.records["clean"], *one.attacks.values(), *beside]


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
