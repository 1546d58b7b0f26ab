"""The steps that measure a model: costs, clean accuracy, attacks, security curve, sanity checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.attacks.gradient import Pgd
from robustkit.attacks.noise import Noise
from robustkit.attacks.threat import Attack
from robustkit.compress.costs import measure_costs
from robustkit.evaluation.attacked import attack_outcome, clean_outcome
from robustkit.evaluation.both import Ways, adaptive, attack_both, checked_view, on_view
from robustkit.evaluation.checks import preflight, probes
from robustkit.evaluation.curve import security_curve
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.reporting import default_of, trained_steps, training_of
from robustkit.models.wrapped import Wrapped, without_gradient
from robustkit.recipe.cost import autoattack_passes, one_attack_passes, parameter_of
from robustkit.recipe.facts import facts_of
from robustkit.recipe.plan import Step
from robustkit.recipe.spec import Use
from robustkit.seeding import derive_seed
from robustkit.steps.last import best_and_last
from robustkit.store import AGAIN, PARTIAL, Partial
from robustkit.workbench import Workbench, threat_of

OUTCOME = "outcome.npz"
GALLERY = "gallery.npz"
FOOLING = "fooling.npz"
"""What an attack found of every example, rounded to 8 bits: the first probe of the variant's children."""
LONG = 30.0
"""Seconds from which an attack is worth an estimate."""
CURVE_STEPS = 10
CURVE_TRIES = 4


def measure_step(bench: Workbench, step: Step) -> None:
    """Store parameters, non-zeros, bytes, MACs, peak activations and sparsity per layer of a model."""
    (fit_key,) = step.parents
    # Models that answer beside it are part of what it costs.
    joined = bool(bench.recipe.variant(step.variant).members)
    costs = measure_costs(bench.load(fit_key, wrapped=joined), bench.any_dataset().shape, bench.artefact(fit_key))
    values = asdict(costs)
    values["layers"] = [layer.model_dump() for layer in costs.layers]
    values["classes"] = list(bench.any_dataset().classes)
    bench.store.finish(step.key, values)


def clean_step(bench: Workbench, step: Step) -> None:
    """Store which test examples a model gets right without an attack."""
    test = bench.test()
    outcome = clean_outcome(
        bench.model(step.parents[0]),
        test.images,
        test.labels,
        batch_size=bench.recipe.evaluate.batch_size,
        device=bench.device,
    )
    _finish_outcome(bench, step, outcome)


def attack_step(bench: Workbench, step: Step) -> None:
    """Store which test examples a model gets right under one attack, and images for the gallery."""
    assert step.use is not None
    model, test = bench.model(step.parents[0]), bench.test()
    attack: Attack = bench.create("attack", step.use)  # type: ignore[assignment]
    clean = read_outcome(bench, step.parents[1])
    _estimate(bench, step.use, clean, ways=_ways(model))
    shown = min(bench.recipe.evaluate.gallery, len(test))
    followed = any(step.key in other.wants for other in bench.plan.steps)
    keep = len(test) if followed else shown
    outcome, ways = attack_both(
        model, attack, lambda one, again: _attacked(bench, step, model, one, clean=clean, keep=keep, again=again)
    )
    files: tuple[str, ...] = (OUTCOME,)
    if outcome.adversarial is not None and shown:
        _write_gallery(bench, step, model, outcome.adversarial[:shown])
        files = (*files, GALLERY)
    if outcome.adversarial is not None and followed:
        levels = (255 * outcome.adversarial).round().to(torch.uint8)
        bench.store.write_arrays(step.key, FOOLING, {"images": levels.numpy()})
        files = (*files, FOOLING)
    notes = [str(note) for note in getattr(attack, "notes", ())]
    expected = bool(getattr(attack, "minimum_norm", False))
    _finish_outcome(bench, step, outcome, {"notes": notes, "minimum_norm": expected}, files, ways)


def _ways(model: nn.Module) -> int:
    """Return how often each attack is run on a model."""
    return 2 if isinstance(model, Wrapped) and not model.transparent else 1


def _attacked(
    bench: Workbench, step: Step, model: nn.Module, attack: Attack, *, clean: Outcome, keep: int, again: bool
) -> Outcome:
    """Return the outcome of one attack, the second of a step with `again`; each goes on where the run was stopped."""
    assert step.use is not None
    test = bench.test()
    return attack_outcome(
        model,
        test.images,
        test.labels,
        attack,
        threat_of(bench.recipe.threat),
        clean=clean,
        seed=derive_seed(step.seed, step.key, "attack"),
        label=step.use.name,
        batch_size=bench.recipe.evaluate.batch_size,
        device=bench.device,
        keep=keep,
        probes=_probes(bench, step, test.images),
        quantize_input=bench.recipe.evaluate.quantize_input,
        allowed=bench.allowed,
        on_progress=bench.attacked,
        checkpoint=Partial(bench.store, step.key, AGAIN if again else PARTIAL),
        followed=not again and _ways(model) == 2,
    )


def _estimate(bench: Workbench, use: Use, clean: Outcome, *, ways: int) -> None:
    """Say what an attack costs at most before it starts, where that may be long."""
    classes = len(bench.any_dataset().classes)
    norm = bench.recipe.threat.norm
    facts = replace(facts_of(bench.recipe), classes=classes)
    passes = ways * one_attack_passes(use, parameter_of(bench.recipe), facts, norm)
    each = clean.seconds / max(1, clean.forwards)
    images = int(clean.correct.sum())
    if passes * each * images >= LONG:
        bench.events(
            "estimate",
            {
                "passes": passes,
                "seconds": passes * each * images,
                "autoattack_passes": autoattack_passes(classes, norm),
                "autoattack_seconds": autoattack_passes(classes, norm) * each * images,
            },
        )


def _probes(bench: Workbench, step: Step, clean: Tensor) -> Tensor | None:
    """Return what fooled the parent, like the clean images (N, C, H, W), as far as it is there."""
    for key in step.wants:
        record = bench.store.record(key)
        if record is not None and FOOLING in record["files"]:
            images = torch.from_numpy(bench.store.read_arrays(key, FOOLING)["images"])
            return images if images.shape == clean.shape else None
    return None


def _write_gallery(bench: Workbench, step: Step, model: nn.Module, adversarial: Tensor) -> None:
    count = len(adversarial)
    clean = bench.test().images[:count]
    with torch.no_grad():
        before = model(clean.to(torch.float32) / 255).float().softmax(1)
        after = model(adversarial.to(bench.device)).float().softmax(1)
    arrays = {
        "clean": clean,
        "adversarial": adversarial.float(),
        "label": bench.test().labels[:count],
        "prediction_clean": before.argmax(1),
        "prediction_adversarial": after.argmax(1),
        "confidence_clean": before.amax(1),
        "confidence_adversarial": after.amax(1),
    }
    bench.store.write_arrays(step.key, GALLERY, {name: value.cpu().numpy() for name, value in arrays.items()})


def _finish_outcome(
    bench: Workbench,
    step: Step,
    outcome: Outcome,
    extra: Mapping[str, Any] | None = None,
    files: tuple[str, ...] = (OUTCOME,),
    ways: Ways | None = None,
) -> None:
    arrays = {
        "correct": outcome.correct,
        "prediction": outcome.prediction,
        "distance": outcome.distance,
        "labels": bench.test().labels.cpu().numpy(),
        **(ways or {}),
    }
    if outcome.minimal_distance is not None:
        arrays["minimal_distance"] = outcome.minimal_distance
    bench.store.write_arrays(step.key, OUTCOME, arrays)
    record = {
        "forwards": outcome.forwards,
        "backwards": outcome.backwards,
        "seconds": outcome.seconds,
        "projected": outcome.projected,
        "not_finite": outcome.not_finite,
        "silent": outcome.silent,
        **(extra or {}),
    }
    bench.store.finish(step.key, record, files)


def read_outcome(bench: Workbench, key: str) -> Outcome:
    """Return the stored outcome of a clean or an attack step."""
    record = bench.store.record(key) or {}
    arrays = bench.store.read_arrays(key, OUTCOME)
    return Outcome(
        correct=arrays["correct"],
        prediction=arrays["prediction"],
        distance=arrays["distance"],
        forwards=int(record.get("forwards", 0)),
        backwards=int(record.get("backwards", 0)),
        seconds=float(record.get("seconds", 0.0)),
        projected=int(record.get("projected", 0)),
    )


def curve_step(bench: Workbench, step: Step) -> None:
    """Store which test examples stay right at each eps of the security curve."""
    recipe, test = bench.recipe, bench.test()
    model, clean = bench.model(step.parents[0]), read_outcome(bench, step.parents[1])
    attacks: dict[str, Attack] = {"pgd": adaptive(Pgd(steps=CURVE_STEPS), model), "noise": Noise(tries=CURVE_TRIES)}
    correct = {
        name: security_curve(
            model,
            test.images,
            test.labels,
            attack,
            recipe.threat.norm,
            recipe.evaluate.eps_curve,
            clean=clean,
            seed=derive_seed(step.seed, step.key, name),
            batch_size=recipe.evaluate.batch_size,
            device=bench.device,
            quantize_input=recipe.evaluate.quantize_input,
            allowed=bench.allowed,
        )
        for name, attack in attacks.items()
    }
    record = {"eps": list(recipe.evaluate.eps_curve), "correct": correct, "n": len(test)}
    bench.store.finish(step.key, record)


def checks_step(bench: Workbench, step: Step) -> None:
    """Store the flags of the sanity checks on a model; its parent is the surrogate."""
    test, recipe = bench.test(), bench.recipe
    seed = derive_seed(step.seed, step.key)
    deployed = bench.model(step.parents[0])
    model = checked_view(deployed, test.images[:8].to(bench.device))
    threat = threat_of(recipe.threat)
    flags = preflight(model, test.images, test.labels, threat, seed=seed, device=bench.device)
    flags += probes(
        model,
        test.images,
        test.labels,
        threat,
        seed=seed,
        device=bench.device,
        surrogate=bench.load(step.parents[2]) if len(step.parents) > 2 else None,
        compressed=bool(recipe.variant(step.variant).compress),
        # Rounding to few bits fools one step more than many as well, without any collapse in training.
        one_step=trained_steps(training_of(recipe, step.variant), default_of) == 1 and not without_gradient(deployed),
    )
    flags = flags if model is deployed else on_view(flags, rounded=without_gradient(deployed))
    kept = best_and_last(bench, step)
    flags += kept.pop("flags", [])
    bench.store.finish(step.key, {"flags": [flag.model_dump() for flag in flags], **kept})
