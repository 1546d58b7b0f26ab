"""What a run could not measure: the steps that failed, the flags they raise, and the gates they leave undecided."""

from __future__ import annotations

from collections.abc import Container, Mapping

from robustkit.recipe.gates import Gate
from robustkit.recipe.plan import Plan, Step, content_key
from robustkit.results import Flag, Results, StepFailure

ATTACK_FAILED = "attack-failed"


def failures_of(plan: Plan, failed: Mapping[str, str]) -> list[StepFailure]:
    """Return a record for each step of the plan that failed; `failed`: messages by the steps' keys."""
    return [
        StepFailure(variant=step.variant, seed=step.seed, step=step_name(step), message=failed[step.key])
        for step in plan.steps
        if step.key in failed
    ]


def step_name(step: Step) -> str:
    """Return what a step is called in a report: its kind, for an attack with the label."""
    return step.kind if step.use is None else f"{step.kind} {step.use.label}"


def attack_flags(plan: Plan, variant: str, seed: int, present: Container[str], failed: Mapping[str, str]) -> list[Flag]:
    """Return a *wrong* flag for each attack of the recipe that a variant has no result of."""
    found = []
    for use in plan.recipe.evaluate.attacks:
        if use.label not in present:
            key = plan.attack_step(variant, seed, use.label).key
            message = (
                f"attack {use.label} failed: {failed.get(key, 'it left no result')}; the worst case is over fewer "
                "attacks: correct the attack or take it out of the recipe, and run again"
            )
            found.append(Flag(id=ATTACK_FAILED, severity="wrong", message=message))
    return found


def unsound_flags(plan: Plan, variant: str, seed: int, failed: Mapping[str, str]) -> list[Flag]:
    """Return a *wrong* flag where an attack breaks what a certificate of the variant says cannot be broken."""
    steps = [step for step in plan.of(variant, seed) if step.kind == "soundness" and step.key in failed]
    return [Flag(id="unsound", severity="wrong", message=failed[step.key]) for step in steps]


def latency_key(step: Step, failed: Container[str]) -> str:
    """Return the key that a latency step's measurement has: its own, unless models that it compares are missing."""
    there = sorted({key for key in step.parents if key not in failed})
    return step.key if len(there) == len(set(step.parents)) else content_key(kind="latency", of=step.key, models=there)


def undecided(gate: Gate, results: Results) -> bool:
    """Say whether a gate asks for a variant that a seed did not bring, or a worst case over fewer attacks."""
    there = {(row.name, row.seed) for row in results.variants}
    lost = {one.variant for one in results.failures if (one.variant, one.seed) not in there}
    fewer = {row.name for row in results.variants if any(flag.id == ATTACK_FAILED for flag in row.flags)}
    return any(variant in lost or (metric == "worst" and variant in fewer) for metric, variant in gate.references())
