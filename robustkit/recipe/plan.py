"""From a recipe to steps with content keys. Pure: reads no data, runs nothing, imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from robustkit.recipe.describe import describe_use as describe_use
from robustkit.recipe.describe import describe_variant as describe_variant
from robustkit.recipe.quantized import ancestors_of, quantizer_of, queries_of
from robustkit.recipe.rewind import kept_epochs
from robustkit.recipe.spec import Recipe, ThreatSpec, TrainSpec, Use, VariantSpec

Kind = Literal[
    "fit",
    "measure",
    "clean",
    "attack",
    "artefact",
    "audit",
    "curve",
    "checks",
    "latency",
    "certify",
    "soundness",
    "corruptions",
    "success",
    "tolerance",
]
FORMAT = 3
"""Raised when the meaning of a step changes, so that older results are not taken for new ones."""

PARTED = "partition_ensemble"
"""The defense whose vote tolerates a number of poisons."""
PROBED = frozenset({"cascade"})
"""Attacks that try first what fooled the parent."""
AttackKeys = dict[tuple[str | None, int, str], str]
"""(variant, seed, label of the attack) -> key of the step."""
SourceHash = Callable[[str, Use], str]
"""(kind of plugin, use) -> hash of its source: the version for built-ins, the file's content for users' code."""


@dataclass(frozen=True)
class Step:
    """One unit of work. Equal keys mean equal work: names and labels are not part of the key."""

    kind: Kind
    key: str
    variant: str
    seed: int
    parents: tuple[str, ...] = ()
    """Keys of the steps that this one reads."""
    use: Use | None = None
    """The attack of an attack step, the certificate of a certify step."""
    description: str = ""
    wants: tuple[str, ...] = ()
    """Keys of steps whose results it uses where they are there."""
    origin: str | None = None
    """Key of the fit step whose weights a fit step starts from; it is among `parents`."""
    teacher: str | None = None
    """Key of the fit step whose model a fit step learns from; it is among `parents`."""


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which each comes after those it reads, and the keys by variant and seed."""

    recipe: Recipe
    data_fingerprint: str
    steps: tuple[Step, ...]
    fit_keys: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def of(self, variant: str, seed: int) -> tuple[Step, ...]:
        """Return the steps of one variant under one seed."""
        return tuple(step for step in self.steps if step.variant == variant and step.seed == seed)

    def attack_step(self, variant: str, seed: int, label: str) -> Step:
        """Return the step of one attack by its label."""
        return next(
            step
            for step in self.of(variant, seed)
            if step.kind == "attack" and step.use is not None and step.use.label == label
        )


def content_key(**parts: object) -> str:
    """Return 20 hex digits of the sha256 of the parts as canonical JSON."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=_plain, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def make_plan(recipe: Recipe, data_fingerprint: str, source_hash: SourceHash) -> Plan:
    """Return the steps of a recipe; equal recipes on equal data with equal plugin sources give equal keys."""
    steps: list[Step] = []
    fit_keys: dict[tuple[str, int], str] = {}
    attack_keys: AttackKeys = {}
    for seed in recipe.seeds:
        for variant in recipe.variants:
            fit = _fit_step(recipe, variant, seed, data_fingerprint, fit_keys, source_hash)
            fit_keys[variant.label, seed] = fit.key
            steps.append(fit)
            steps.extend(_evaluation_steps(recipe, variant, seed, fit, attack_keys, source_hash))
    if recipe.evaluate.latency and recipe.variants:
        steps.append(_latency_step(recipe, fit_keys))
    return Plan(recipe, data_fingerprint, tuple(steps), fit_keys)


def _identity(kind: str, use: Use, source_hash: SourceHash) -> dict[str, object]:
    return {"name": use.name, "parameters": use.parameters, "source": source_hash(kind, use)}


def _fit_step(
    recipe: Recipe,
    variant: VariantSpec,
    seed: int,
    data_fingerprint: str,
    fit_keys: Mapping[tuple[str, int], str],
    source_hash: SourceHash,
) -> Step:
    parent = fit_keys[variant.parent, seed] if variant.parent else None
    train = variant.train
    # Of a variant that is not trained the teacher is only what its children inherit.
    teacher = fit_keys[variant.teacher, seed] if variant.teacher and train else None
    kept = kept_epochs(recipe, variant)
    key = content_key(
        kind="fit",
        parent=parent,
        data=data_fingerprint,
        seed=seed,
        model=_identity("model", variant.model, source_hash),
        defenses=[_identity("defense", use, source_hash) for use in variant.defenses] if train else [],
        compress=[_identity("compressor", use, source_hash) for use in variant.compress],
        threat=_threat(variant.threat) if _meets_threat(variant) else None,
        train=_train(train, source_hash) if train else None,
        normalize=recipe.normalize.model_dump() if recipe.normalize and not parent else None,
        **({"keep": kept} if kept else {}),
        **({"teacher": teacher} if teacher else {}),
        # Only where there are any, so that older results stay valid.
        **(
            {"wrappers": [_identity("defense", use, source_hash) for use in variant.wrappers]}
            if variant.wrappers
            else {}
        ),
    )
    read = tuple(dict.fromkeys(one for one in (parent, teacher) if one))
    described = describe_variant(variant)
    return Step("fit", key, variant.label, seed, read, description=described, origin=parent, teacher=teacher)


def _meets_threat(variant: VariantSpec) -> bool:
    """Say whether the variant's weights may depend on its threat."""
    trained = variant.train is not None and (bool(variant.defenses) or variant.train.select == "robust")
    return trained or bool(variant.compress)


def _train(train: TrainSpec, source_hash: SourceHash) -> dict[str, object]:
    values: dict[str, object] = train.model_dump(
        mode="json", exclude={"optimizer", "schedule", "augment", "time_limit"}
    )
    if not train.stages:
        # What was trained before there were stages keeps its key.
        del values["stages"]
    values["optimizer"] = _identity("optimizer", train.optimizer, source_hash)
    values["schedule"] = _identity("schedule", train.schedule, source_hash)
    values["augment"] = [_identity("augmentation", use, source_hash) for use in train.augment]
    return values


def _evaluation_steps(
    recipe: Recipe, variant: VariantSpec, seed: int, made: Step, attack_keys: AttackKeys, source_hash: SourceHash
) -> list[Step]:
    evaluate, label, fit = recipe.evaluate, variant.label, made.key
    common: dict[str, object] = {"model": fit, "examples": evaluate.examples, "seed": seed}
    threat = _threat(recipe.threat)
    clean = content_key(kind="clean", **common)
    steps = [
        Step("measure", content_key(kind="measure", model=fit, version=2), label, seed, (fit,), description="costs"),
        Step("clean", clean, label, seed, (fit,), description="clean accuracy"),
    ]
    attacks = _attack_steps(recipe, variant, seed, (fit, clean), common, attack_keys, source_hash)
    steps += attacks
    quantizer = quantizer_of(variant.compress)
    if quantizer is not None:
        beside = _artefact_step(recipe, variant, seed, (fit, clean), common, attacks, attack_keys, quantizer)
        attacks = [*attacks, beside]
        steps.append(beside)
    if evaluate.audit:
        read = (clean, *(step.key for step in attacks))
        key = content_key(kind="audit", **common, threat=threat, count=evaluate.audit, steps=sorted(read))
        steps.append(Step("audit", key, label, seed, (fit, *read), description="audit by AutoAttack"))
    if evaluate.eps_curve:
        key = content_key(kind="curve", **common, norm=recipe.threat.norm, eps=evaluate.eps_curve, **_rounding(recipe))
        steps.append(Step("curve", key, label, seed, (fit, clean), description="security curve"))
    # The parent is the surrogate whose adversarial images are tried on its child.
    surrogate = (made.origin,) if made.origin else ()
    key = content_key(kind="checks", **common, threat=threat, surrogate=surrogate)
    steps.append(Step("checks", key, label, seed, (fit, clean, *surrogate), description="sanity checks"))
    steps += _certify_steps(recipe, steps, common, source_hash)
    if evaluate.corruptions:
        key = content_key(kind="corruptions", model=fit, examples=evaluate.examples)
        steps.append(Step("corruptions", key, label, seed, (fit,), description="common corruptions"))
    if recipe.poison is not None:
        # The poison with its parameters is in the key of the data, and so in the model's.
        key = content_key(kind="success", model=fit, examples=evaluate.examples)
        steps.append(Step("success", key, label, seed, (fit,), description="success of the poison"))
    if variant.train is not None and any(use.name == PARTED for use in variant.defenses):
        key = content_key(kind="tolerance", model=fit, examples=evaluate.examples)
        steps.append(Step("tolerance", key, label, seed, (fit,), description="poisons that the vote tolerates"))
    return steps


def _attack_steps(
    recipe: Recipe,
    variant: VariantSpec,
    seed: int,
    parents: tuple[str, str],
    common: Mapping[str, object],
    attack_keys: AttackKeys,
    source_hash: SourceHash,
) -> list[Step]:
    """Return a step for each attack, and note its key; `attack_keys` has those of the variants before."""
    found = []
    for use in recipe.evaluate.attacks:
        relative = attack_keys.get((variant.parent, seed, use.label)) if use.name in PROBED else None
        key = content_key(
            kind="attack",
            **common,
            threat=_threat(recipe.threat),
            gallery=recipe.evaluate.gallery,
            attack=_identity("attack", use, source_hash),
            **_rounding(recipe),
            **({"probes": relative} if relative else {}),
        )
        attack_keys[variant.label, seed, use.label] = key
        wants = (relative,) if relative else ()
        found.append(Step("attack", key, variant.label, seed, parents, use, use.label, wants))
    return found


def _artefact_step(
    recipe: Recipe,
    variant: VariantSpec,
    seed: int,
    parents: tuple[str, str],
    common: Mapping[str, object],
    attacks: list[Step],
    attack_keys: AttackKeys,
    quantizer: Use,
) -> Step:
    """Return the step that attacks a quantized variant beside its surrogate, with what fooled its float ancestors."""
    line = ancestors_of(recipe, variant)
    wants = tuple(attack_keys[one.label, seed, use.label] for one in line for use in recipe.evaluate.attacks)
    read = tuple(step.key for step in attacks)
    asked = {"steps": sorted(read), "crafted": sorted(wants), "queries": queries_of(quantizer)}
    key = content_key(kind="artefact", **common, threat=_threat(recipe.threat), **asked, **_rounding(recipe))
    words = "images of float models, and queries"
    return Step("artefact", key, variant.label, seed, (*parents, *read), quantizer, words, wants)


def _rounding(recipe: Recipe) -> dict[str, object]:
    """Return what rounding and the search's ways add to a key: nothing by default, so that older results stay valid."""
    asked = recipe.evaluate
    rounding: dict[str, object] = {"quantize_input": True} if asked.quantize_input else {}
    ways = {} if asked.precision == "auto" and not asked.compile else {"search": [asked.precision, asked.compile]}
    return {**rounding, **ways}


def _certify_steps(
    recipe: Recipe, steps: list[Step], common: Mapping[str, object], source_hash: SourceHash
) -> list[Step]:
    """Return a step for each certificate, and one that holds them against the attacks among `steps`."""
    clean = next(step for step in steps if step.kind == "clean")
    found = []
    for use in recipe.evaluate.certify:
        certificate = _identity("certificate", use, source_hash)
        key = content_key(kind="certify", **common, threat=_threat(recipe.threat), certificate=certificate)
        found.append(
            Step(
                "certify", key, clean.variant, clean.seed, (*clean.parents, clean.key), use, f"certificate {use.label}"
            )
        )
    if found:
        read = (clean.key, *(step.key for step in (*steps, *found) if step.kind in ("attack", "certify")))
        key = content_key(kind="soundness", steps=sorted(read))
        found.append(
            Step("soundness", key, clean.variant, clean.seed, read, description="certificates against attacks")
        )
    return found


def _latency_step(recipe: Recipe, fit_keys: Mapping[tuple[str, int], str]) -> Step:
    """Latency compares the variants in one interleaved measurement, so it belongs to the set of models."""
    first = recipe.seeds[0]
    models = tuple(fit_keys[variant.label, first] for variant in recipe.variants)
    runtimes = recipe.evaluate.runtimes
    key = content_key(kind="latency", models=sorted(set(models)), **({"runtimes": runtimes} if runtimes else {}))
    told = f", {', '.join(runtimes)}" if runtimes else ""
    return Step("latency", key, "", first, models, description=f"latency, interleaved{told}")


def _threat(threat: ThreatSpec) -> dict[str, object]:
    return {"norm": threat.norm, "eps": threat.eps}


def _plain(value: object) -> object:
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)
