"""`robustkit.evaluate`: how robust is this model on these images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import stats
from robustkit.attacks.engine import Allowed
from robustkit.attacks.threat import Attack, Threat
from robustkit.errors import UsageError
from robustkit.evaluation.artefact import disagreeing
from robustkit.evaluation.artefact_rules import surrogate_flags
from robustkit.evaluation.asked import Model, as_module, checked_examples
from robustkit.evaluation.attacked import attack_outcome, clean_outcome, device_of
from robustkit.evaluation.audit import audit as audit_survivors
from robustkit.evaluation.both import attack_both
from robustkit.evaluation.compare import audit_flags, budget_flags, compare_flags, finite_flags
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.evaluation import Evaluation
from robustkit.evaluation.look import looked_at
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.rules import silent_flags
from robustkit.evaluation.specs import AttackSpec, make_attacks
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.results import Flag

__all__ = ["AttackSpec", "Evaluation", "Model", "as_module", "checked_examples", "evaluate", "make_attacks"]


def evaluate(
    model: Model,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any],
    *,
    threat: Threat,
    attacks: Sequence[AttackSpec] | Mapping[str, Mapping[str, Any] | Attack | None] = ("fgsm", "cascade"),
    seed: int = 0,
    batch_size: int = 256,
    quantize_input: bool = False,
    audit: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    compile: bool = False,
) -> Evaluation:
    """Attack a model and return its clean and attacked accuracy with intervals, costs and flags.

    `model` maps images in [0, 1] to logits (N, classes), two classes or more; any callable will do. It is attacked in
    eval mode, on the device of its parameters, `batch_size` examples at a time. x (N, ...): floats in [0, 1] or
    uint8; y (N,): class numbers. `attacks`: names, `{name: parameters}` (with `as` for a label), objects with the
    Attack protocol, or `{label: object}`. A loaded model with inference wrappers is attacked as deployed and through
    its view. The model and all global generators are left exactly as they were, also when
    an attack raises. A model in float16, bfloat16 or float64 gets the images in its own type. Under
    `torch.inference_mode()` the attacks have their gradients all the same. `quantize_input`: adversarial images are
    rounded to multiples of 1/255 before they are judged, within the ball; x has to be of 8 bits then. `audit`: so many
    random survivors meet AutoAttack-standard, which takes a hundred times as long each. `precision`: what attacks may
    search in (`auto`: bfloat16 where a GPU has it and it measures faster); a success counts only if the model in
    its own precision agrees. `compile`: attacks may use `torch.compile`, where it measures faster; trying takes long.

    Raises:
        UsageError: images outside [0, 1] or not of 8 bits where they have to be, labels that do not fit, an unknown
            attack or parameter.
        ModelError: the model returns no logits, or was made under `torch.inference_mode()`.
        AttackError: an attack cannot run on this model or threat.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    with torch.inference_mode(False):
        images, labels = checked_examples(x, y, threat)
        made = make_attacks(attacks)
        module = as_module(model)
        allowed = Allowed(precision, compile)
        found = _evaluated(module, images, labels, threat, made, seed, batch_size, quantize_input, allowed)
        if not audit:
            return found
        audited = audit_survivors(
            module,
            images,
            labels,
            threat,
            survivors=found.correct,
            count=audit,
            seed=seed,
            batch_size=batch_size,
            device=device_of(module, images.device),
            quantize_input=quantize_input,
            allowed=allowed,
        )
        return replace(found, audit=audited, flags=[*found.flags, *audit_flags(audited)])


def _evaluated(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    made: Mapping[str, tuple[str, Attack]],
    seed: int,
    batch_size: int,
    quantize_input: bool,
    allowed: Allowed,
) -> Evaluation:
    device = device_of(module, images.device)
    clean = clean_outcome(module, images, labels, batch_size=batch_size, device=device)
    outcomes: dict[str, Outcome] = {}
    for label, (_, attack) in made.items():

        def run(one: Attack, view: bool, label: str = label) -> Outcome:
            return attack_outcome(
                module,
                images,
                labels,
                one,
                threat,
                clean=clean,
                seed=seed,
                label=label,
                batch_size=batch_size,
                device=device,
                quantize_input=quantize_input,
                allowed=allowed,
            )

        outcomes[label], _ = attack_both(module, attack, run)
    found = _evaluation(module, images, labels, threat, clean, outcomes, made, seed, device)
    apart = _view_flags(module, images, batch_size, device) if outcomes else []
    return replace(found, quantized=quantize_input, flags=[*found.flags, *apart])


def _view_flags(module: nn.Module, images: Tensor, batch_size: int, device: torch.device) -> list[Flag]:
    """Return a flag where attacks on a quantized model took something that answers otherwise."""
    if not isinstance(module, Quantized | OnnxModel) or module.made is None:
        return []
    apart = disagreeing(module, images, batch_size=batch_size, device=device)
    return surrogate_flags(apart, len(images), exact=module.made.runtime == "torch")


def _evaluation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    clean: Outcome,
    outcomes: dict[str, Outcome],
    made: Mapping[str, tuple[str, Attack]],
    seed: int,
    device: torch.device,
) -> Evaluation:
    correct = {"clean": clean.correct, **{label: outcome.correct for label, outcome in outcomes.items()}}
    worst = stats.worst_case(correct.values())
    flags = looked_at(model, x, y, threat, seed=seed, device=device) if outcomes else []
    flags += finite_flags({"clean": clean.not_finite, **{name: one.not_finite for name, one in outcomes.items()}})
    flags += compare_flags(correct, {label: name for label, (name, _) in made.items()})
    flags += silent_flags({label: one.silent for label, one in outcomes.items()}, clean.correct.size)
    flags += budget_flags({label: one.projected for label, one in outcomes.items()})
    for label, (_, attack) in made.items():
        notes = getattr(attack, "notes", ())
        flags += [Flag(id="attack-note", severity="note", message=f"{label}: {note}") for note in notes]
    return Evaluation(
        clean=clean.rate,
        worst=stats.clopper_pearson(int(worst.sum()), int(worst.size)),
        attacks={label: outcome.rate for label, outcome in outcomes.items()},
        outcomes={"clean": clean, **outcomes},
        flags=flags,
        threat=threat,
        correct=worst,
        distances={
            label: MinimumDistances(threat.norm, one.minimal_distance)
            for label, one in outcomes.items()
            if one.minimal_distance is not None
        },
    )
