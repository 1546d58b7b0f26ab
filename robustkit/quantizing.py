"""From what the store holds of a quantized variant to its part of the results. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from robustkit.evaluated import Evaluated, rate_of
from robustkit.evaluation.artefact_rules import missed_flags, stronger_flags, surrogate_flags
from robustkit.missing import ATTACK_FAILED
from robustkit.recipe.plan import Plan
from robustkit.results import Flag, QuantizedRates


def quantized_of(one: Evaluated) -> QuantizedRates | None:
    """Return what was found of a quantized variant; None for another, or where it was not attacked to the end."""
    made, record = one.records["fit"].get("quantization"), one.records.get("artefact")
    if made is None or record is None or one.surrogate is None:
        return None
    return QuantizedRates(
        bits=made["bits"],
        trained=made["trained"],
        calibration_images=made["calibration_images"],
        calibration_sha256=made["calibration_sha256"],
        surrogate=rate_of(one.surrogate),
        transfer=rate_of(one.beside["transfer"]),
        union=rate_of(one.correct["worst"]),
        queries=record["queries"],
        sets=record["sets"],
        disagreeing=record["disagreeing"],
    )


def quantized_notes(one: Evaluated) -> list[str]:
    """Return what the report says of a quantized variant."""
    found = quantized_of(one)
    return [] if found is None else [str(found)]


def quantized_flags(plan: Plan, one: Evaluated, parent: Evaluated | None, failed: Mapping[str, str]) -> list[Flag]:
    """Return the flags of a quantized variant beside its float parent; a *wrong* one where an attack is missing."""
    lost = [step for step in plan.of(one.variant, one.seed) if step.kind == "artefact" and not one.beside]
    if lost:
        message = (
            f"float models' images and queries were not tried: {failed.get(lost[0].key, 'the step left no result')}; "
            "the worst case is over fewer attacks: correct what failed and run again"
        )
        return [Flag(id=ATTACK_FAILED, severity="wrong", message=message)]
    found = quantized_of(one)
    if found is None or one.surrogate is None:
        return []
    made = one.records["fit"]["quantization"]
    flags = missed_flags(one.surrogate, one.beside["transfer"], one.beside["square"])
    flags += surrogate_flags(found.disagreeing, found.union.n, exact=made.get("runtime", "torch") == "torch")
    if parent is not None and set(parent.attacks) == set(one.attacks):
        trained = plan.recipe.variant(one.variant).train is not None
        flags += stronger_flags(one.correct["worst"], parent.correct["worst"], trained=trained)
    return flags
