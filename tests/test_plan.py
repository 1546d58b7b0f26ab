"""Content keys: what runs again after a change, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robustkit.recipe.plan import Plan, describe_variant, make_plan
from robustkit.recipe.spec import EvaluateSpec, Recipe, ThreatSpec, TrainSpec, Use, VariantSpec

MODEL = Use(name="small_cnn", parameters={"widths": [8, 8, 8]}, label="small_cnn")
THREAT = ThreatSpec(norm="linf", eps=0.1)


def use(name: str, label: str | None = None, **parameters: object) -> Use:
    return Use(name=name, parameters=parameters, label=label or name)


def variant(label: str, parent: str | None = None, **values: object) -> VariantSpec:
    values.setdefault("train", TrainSpec())
    return VariantSpec.model_validate({"label": label, "parent": parent, "model": MODEL, "threat": THREAT, **values})


def recipe(*variants: VariantSpec, attacks: tuple[Use, ...] = (), **values: object) -> Recipe:
    chosen = variants or (
        variant("baseline"),
        variant("robust", defenses=(use("n_fgsm"),)),
        variant("pruned", "robust", defenses=(use("n_fgsm"),), compress=(use("global_l1", sparsity=0.8),)),
    )
    evaluate = EvaluateSpec(attacks=attacks or (use("fgsm"), use("pgd", steps=20)))
    return Recipe.model_validate(
        {
            "name": "test",
            "data": use("digits"),
            "threat": THREAT,
            "variants": chosen,
            "evaluate": evaluate,
            **values,
        }
    )


def plan(of: Recipe, data: str = "data", source: Callable[[str, Use], str] = lambda kind, use: "v1") -> Plan:
    return make_plan(of, data, source)


def keys(of: Plan) -> set[str]:
    return {step.key for step in of.steps}


def new_steps(before: Plan, after: Plan) -> list[tuple[str, str]]:
    return [(step.variant, step.kind) for step in after.steps if step.key not in keys(before)]


def test_equal_recipes_have_equal_plans() -> None:
    assert plan(recipe()).steps == plan(recipe()).steps


def test_adding_an_attack_runs_that_attack_alone() -> None:
    before = plan(recipe())
    after = plan(recipe(attacks=(use("fgsm"), use("pgd", steps=20), use("pgd", "pgd-50", steps=50))))
    assert new_steps(before, after) == [("baseline", "attack"), ("robust", "attack"), ("pruned", "attack")]


def test_renaming_a_variant_an_attack_or_the_run_runs_nothing() -> None:
    before = plan(recipe())
    renamed = recipe(
        variant("plain"),
        variant("hard", defenses=(use("n_fgsm", "mine"),)),
        variant("small", "hard", defenses=(use("n_fgsm"),), compress=(use("global_l1", sparsity=0.8),)),
        attacks=(use("fgsm", "one-step"), use("pgd", "strong", steps=20)),
        name="other",
    )
    assert new_steps(before, plan(renamed)) == []


def test_changing_a_variant_runs_it_and_its_descendants() -> None:
    before = plan(recipe())
    changed = recipe(
        variant("baseline"),
        variant("robust", defenses=(use("n_fgsm", k=3),)),
        variant("pruned", "robust", defenses=(use("n_fgsm"),), compress=(use("global_l1", sparsity=0.8),)),
    )
    touched = {name for name, kind in new_steps(before, plan(changed)) if kind != "latency"}
    assert touched == {"robust", "pruned"}


def test_changing_a_child_leaves_its_parent_alone() -> None:
    before = plan(recipe())
    variants = list(recipe().variants)
    variants[2] = variants[2].model_copy(update={"compress": (use("global_l1", sparsity=0.9),)})
    touched = {name for name, kind in new_steps(before, plan(recipe(*variants))) if kind != "latency"}
    assert touched == {"pruned"}


def test_latency_is_measured_again_only_when_the_models_change() -> None:
    assert ("", "latency") not in new_steps(plan(recipe()), plan(recipe(attacks=(use("noise"),))))
    fewer = recipe(*recipe().variants[:2])
    assert ("", "latency") in new_steps(plan(recipe()), plan(fewer))


def test_a_changed_plugin_file_changes_the_keys_of_what_uses_it() -> None:
    def edited(kind: str, use: Use) -> str:
        return "v2" if use.name == "n_fgsm" else "v1"

    touched = {name for name, kind in new_steps(plan(recipe()), plan(recipe(), source=edited)) if kind != "latency"}
    assert touched == {"robust", "pruned"}


@pytest.mark.parametrize(
    "change",
    [{"seeds": (1,)}, {"threat": ThreatSpec(norm="linf", eps=0.2)}, {"evaluate": EvaluateSpec(examples=10)}],
)
def test_seed_threat_and_examples_are_in_the_keys(change: dict[str, object]) -> None:
    assert new_steps(plan(recipe()), plan(recipe(**change)))


def test_other_data_run_everything() -> None:
    assert not keys(plan(recipe())) & keys(plan(recipe(), data="other"))


def test_an_attacks_eps_does_not_retrain_a_variant_without_defenses() -> None:
    weaker = ThreatSpec(norm="linf", eps=0.05)
    variants = tuple(one.model_copy(update={"threat": weaker}) for one in recipe().variants)
    new = new_steps(plan(recipe()), plan(recipe(*variants, threat=weaker)))
    assert ("baseline", "fit") not in new
    assert ("robust", "fit") in new


def test_eps_retrains_a_variant_whose_epoch_is_chosen_by_attacked_accuracy() -> None:
    def fit_key(eps: float) -> str:
        threat = ThreatSpec(norm="linf", eps=eps)
        one = variant("baseline", train=TrainSpec(select="robust"), threat=threat)
        return plan(recipe(one, threat=threat)).fit_keys["baseline", 0]

    assert fit_key(0.1) != fit_key(0.3)


def test_each_seed_has_its_own_steps_and_every_step_comes_after_what_it_reads() -> None:
    made = plan(recipe(seeds=(0, 1, 2)))
    assert len({step.key for step in made.steps if step.kind == "fit"}) == 9
    seen: set[str] = set()
    for step in made.steps:
        assert set(step.parents) <= seen
        seen.add(step.key)


def test_what_is_done_to_a_variant_in_words() -> None:
    pruned = variant("d", "a", compress=(use("global_l1", sparsity=0.8),), defenses=(use("n_fgsm"),))
    assert [
        describe_variant(one) for one in (variant("a"), variant("b", "a"), variant("c", "a", train=None), pruned)
    ] == ["standard training", "trained further", "no change", "global_l1(sparsity=0.8) + n_fgsm"]
