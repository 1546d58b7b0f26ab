"""`robustkit.evaluate`: how robust is this model on these images?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import registry, stats
from robustkit.attacks.engine import Allowed
from robustkit.attacks.threat import Attack, Threat
from robustkit.attacks.torchattacks import TorchAttack
from robustkit.errors import ModelError, UsageError
from robustkit.evaluation.attacked import as_images, attack_outcome, clean_outcome, device_of
from robustkit.evaluation.audit import audit as audit_survivors
from robustkit.evaluation.both import attack_both
from robustkit.evaluation.compare import audit_flags, budget_flags, compare_flags, finite_flags
from robustkit.evaluation.distances import MinimumDistances
from robustkit.evaluation.look import looked_at
from robustkit.evaluation.outcome import Outcome
from robustkit.evaluation.rules import silent_flags
from robustkit.results import Audit, Flag, Rate

AttackSpec = str | Mapping[str, Mapping[str, Any] | Attack | None] | Attack
Model = nn.Module | Callable[[Tensor], Tensor]
OTHER_TYPES = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(repr=False)
class Evaluation:
    """Accuracies with 95 % intervals, what each attack did, and the doubts about it."""

    clean: Rate
    worst: Rate
    """Share of examples that are right under every attack."""
    attacks: dict[str, Rate]
    outcomes: dict[str, Outcome]
    flags: list[Flag]
    threat: Threat
    correct: NDArray[np.bool_]
    """Per example: right under every attack."""
    distances: dict[str, MinimumDistances] = field(default_factory=dict)
    """Of the minimum-norm attacks: the smallest distance found of each example, whatever the threat's eps."""
    audit: Audit | None = None
    """AutoAttack on a random subset of what every attack left, where it was asked for."""
    quantized: bool = False
    """Whether adversarial images were rounded to 8 bits before they were judged."""

    def __repr__(self) -> str:
        rows = [("clean", self.clean), *self.attacks.items(), ("worst", self.worst)]
        width = max(len(name) for name, _ in rows)
        eps = "one eps an example" if isinstance(self.threat.eps, Tensor) else f"eps {self.threat.eps:.4g}"
        bits = ", adversarial images rounded to 8 bits" if self.quantized else ""
        lines = [f"accuracy of {self.clean.n} examples, {self.threat.norm} {eps}{bits}, 95 % intervals"]
        lines += [
            f"  {name:{width}}  {rate.value:7.2%}  [{rate.low:.2%}, {rate.high:.2%}]{self._cost(name)}"
            for name, rate in rows
        ]
        lines += [f"  {name:{width}}  {found!r}" for name, found in self.distances.items()]
        lines += [f"  {self.audit}"] if self.audit is not None else []
        lines += [f"{flag.severity} {flag.id}: {flag.message}" for flag in self.flags]
        return "\n".join(lines)

    def _cost(self, name: str) -> str:
        outcome = self.outcomes.get(name)
        if outcome is None:
            return ""
        return f"  {outcome.forwards:,} forwards, {outcome.backwards:,} backwards, {outcome.seconds:.1f} s"


class _Called(nn.Module):
    """Any callable as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Typed(nn.Module):
    """A model of another floating type between float32 images and float32 logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x.to(self.dtype))
        return logits.float() if isinstance(logits, Tensor) else logits


def as_module(model: Model) -> nn.Module:
    """Return a model as a module that takes float32 images; its type is that of its first floating parameter.

    Raises:
        ModelError: no gradient goes through its parameters.
    """
    if not isinstance(model, nn.Module):
        return _Called(model).eval()
    if any(one.is_inference() for one in model.parameters()):
        raise ModelError(
            "the model was made or loaded under torch.inference_mode(), where no gradient goes through its parameters: "
            "make it outside, or under torch.no_grad()"
        )
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return _Typed(model, dtype) if dtype in OTHER_TYPES else model


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
    return replace(found, quantized=quantize_input)


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


def checked_examples(x: Tensor | NDArray[Any], y: Tensor | NDArray[Any], threat: Threat) -> tuple[Tensor, Tensor]:
    """Return images (N, ...), uint8 or float32 in [0, 1], and labels (N,) as int64.

    Raises:
        UsageError: what is given is not that, or does not fit the threat.
    """
    # Outside inference mode its tensors take no part in a backward; a clone does.
    images, labels = (one.clone() if one.is_inference() else one for one in map(torch.as_tensor, (x, y)))
    if images.dim() < 2:
        raise UsageError(f"images are {tuple(images.shape)}; one row an example (N, ...) is needed")
    if images.dtype != torch.uint8:
        images = as_images(images)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        raise UsageError(f"labels are {labels.dtype} {tuple(labels.shape)}; class numbers (N,) are needed")
    if len(labels) != len(images):
        raise UsageError(f"{len(images)} images but {len(labels)} labels")
    if not len(labels):
        raise UsageError("no images to evaluate on")
    if not isinstance(threat, Threat):
        raise UsageError(f"threat is {threat!r}; give robustkit.Threat('linf', 8 / 255)")
    if isinstance(threat.eps, Tensor) and threat.eps.dim() and len(threat.eps) != len(labels):
        raise UsageError(f"{len(labels)} images but {len(threat.eps)} eps")
    return images, labels.to(torch.int64)


def make_attacks(
    specs: Sequence[AttackSpec] | Mapping[str, Mapping[str, Any] | Attack | None],
) -> dict[str, tuple[str, Attack]]:
    """Return {label: (plugin name, attack)} for names, `{name: parameters}`, objects and `{label: object}`."""
    items: Iterable[AttackSpec] = (
        [{name: values} for name, values in specs.items()] if isinstance(specs, Mapping) else specs
    )
    if isinstance(specs, str):
        items = [specs]
    made: dict[str, tuple[str, Attack]] = {}
    for item in items:
        label, name, attack = _one(item)
        if label in made or label in ("clean", "worst"):
            raise UsageError(f"two attacks are called {label!r}; give one another label: {{{name!r}: {{'as': ...}}}}")
        made[label] = (name, attack)
    return made


def _one(item: AttackSpec) -> tuple[str, str, Attack]:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping):
        if not callable(item):
            raise UsageError(f"{item!r} is no attack: a name, {{name: parameters}} or a callable is needed")
        name = type(item).__name__.lower()
        kind = f"torchattacks.{item.name}" if isinstance(item, TorchAttack) else name
        return getattr(item, "label", None) or name, kind, item
    if len(item) != 1:
        raise UsageError("an attack is written {name: parameters}, one name each")
    name, given = next(iter(item.items()))
    if given is not None and not isinstance(given, Mapping):
        return (name, *_one(given)[1:])
    values = dict(given or {})
    label = str(values.pop("as", name))
    entry = registry.find("attack", name)
    clean, mistakes = registry.check_parameters(entry, values)
    if mistakes:
        raise UsageError(f"attack {name}: " + "; ".join(message for _, message in mistakes))
    return label, name, cast(Attack, registry.create(entry, clean))
