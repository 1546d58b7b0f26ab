"""`gates:` of a recipe: each with its switches, its metrics and variants looked up."""

from __future__ import annotations

from robustkit.errors import UsageError, did_you_mean
from robustkit.recipe.gates import ACCURACIES, CORRUPTED, CURVES, POISONED, SIZES, Gate, curve_point, parse_gate
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import EvaluateSpec, GateSpec

Place = tuple[str | int, ...]
SWITCHES = ("confident", "every_seed")


def read_gates(reader: Reader, value: object, evaluate: EvaluateSpec, *, poisoned: bool) -> tuple[GateSpec, ...]:
    """Return the gates of a recipe; what is wrong with one is noted in the reader."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for number, item in enumerate(items):
        place: Place = ("gates", number) if isinstance(value, list) else ("gates",)
        gate = _gate(reader, place, item)
        if gate is None:
            continue
        for metric, variant in gate.references():
            _check_metric(reader, place, metric, evaluate, poisoned=poisoned)
            if reader.labels and variant not in reader.labels:
                hint = did_you_mean(variant, reader.labels) or f"variants: {', '.join(reader.labels)}"
                reader.problem(place, f"the gate names an unknown variant {variant!r}", hint)
        found.append(GateSpec(text=gate.text, confident=gate.confident, every_seed=gate.every_seed))
    return tuple(found)


def _gate(reader: Reader, place: Place, item: object) -> Gate | None:
    switches = dict.fromkeys(SWITCHES, False)
    if isinstance(item, dict):
        given = reader.mapping(place, item, ("gate", *SWITCHES))
        item = given.get("gate")
        for name in SWITCHES:
            switch = given.get(name, False)
            if not isinstance(switch, bool):
                reader.problem((*place, name), f"{name} is true or false, not {switch!r}")
                return None
            switches[name] = switch
    if not isinstance(item, str):
        reader.problem(place, "a gate is a text such as `clean(baseline) >= 85%`")
        return None
    try:
        return parse_gate(item, switches["confident"], switches["every_seed"])
    except UsageError as error:
        message, _, hint = str(error).partition("; ")
        reader.problem(place, message, hint or None)
        return None


def _check_metric(reader: Reader, place: Place, metric: str, evaluate: EvaluateSpec, *, poisoned: bool) -> None:
    labels = (use.label for use in (*evaluate.attacks, *evaluate.certify))
    measured = (*(POISONED if poisoned else ()), *(CORRUPTED if evaluate.corruptions else ()))
    known = (*ACCURACIES, *measured, *SIZES, *labels)
    if metric in known:
        return
    if metric in POISONED:
        hint = "e.g. data: {digits: , poison: badnets}"
        reader.problem(place, f"the gate asks for {metric!r}, and the data are not poisoned", hint)
    elif metric in CORRUPTED:
        reader.problem(place, f"the gate asks for {metric!r}, which is not measured", "evaluate: {corruptions: true}")
    elif "@" in metric:
        _check_point(reader, place, metric, evaluate)
    else:
        hint = did_you_mean(metric, known) or f"known: {', '.join(known)}"
        reader.problem(place, f"the gate names an unknown metric {metric!r}", hint)


def _check_point(reader: Reader, place: Place, metric: str, evaluate: EvaluateSpec) -> None:
    """Note a point of a security curve that is not measured."""
    attack, eps = curve_point(metric) or (metric, None)
    if attack not in CURVES or eps is None:
        hint = f"attack@eps, e.g. {CURVES[0]}@0.1; curves are drawn by {' and '.join(CURVES)}"
        reader.problem(place, f"{metric!r} is no point of a security curve", hint)
    elif eps not in evaluate.eps_curve:
        message = f"the gate asks for {metric!r}, and the security curve has no eps {eps:g}"
        reader.problem(place, message, f"evaluate: {{eps_curve: [..., {eps:g}]}}")
