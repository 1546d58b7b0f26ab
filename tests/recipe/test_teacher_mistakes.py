"""Teachers in recipes: the order of variants, what children inherit, keys, costs, and every mistake at its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit import registry
from robustkit.cli.group import run as cli
from robustkit.errors import RecipeError
from robustkit.recipe.jsonschema import recipe_schema
from robustkit.recipe.plan import Plan, describe_variant, make_plan
from robustkit.recipe.schema import parse_recipe
from robustkit.recipe.spec import Recipe
from robustkit.train.hooks import Defense

HEAD = "data: {digits: {limit: 100}}\nmodel: small_cnn\ntrain: {epochs: 2}\nvariants:\n"
FAMILY = """\
  small: {defenses: [distill], teacher: big}
  big: {defenses: [n_fgsm]}
  tuned: {from: small, train: {}}
  other: {from: small, train: {}, teacher: tuned}
  plain: {from: small, train: {}, defenses: []}
  pruned: {from: small, compress: [global_l1: {sparsity: 50%}]}
  heir: {from: pruned, train: {}}
  same: {from: big, train: {}, defenses: [ard], teacher: big}
"""


def parse(variants: str, folder: Path | None = None) -> Recipe:
    return parse_recipe(HEAD + variants, folder=folder)


def plan(recipe: Recipe) -> Plan:
    return make_plan(recipe, "data", lambda kind, use: "v1")


def teachers(recipe: Recipe) -> dict[str, str | None]:
    return {variant.label: variant.teacher for variant in recipe.variants}


def test_a_teacher_comes_first_and_is_inherited_with_the_defenses() -> None:
    recipe = parse(FAMILY)
    assert [variant.label for variant in recipe.variants] == [
        "big", "small", "tuned", "other", "plain", "pruned", "heir", "same"
    ]  # fmt: skip
    assert teachers(recipe) == {
        "big": None, "small": "big", "tuned": "big", "other": "tuned", "plain": None, "pruned": "big", "heir": "big",
        "same": "big",
    }  # fmt: skip
    assert describe_variant(recipe.variant("small")) == "distill, teacher big"


def test_a_matrix_names_teachers() -> None:
    recipe = parse("  a:\n  b:\n  of-$who: {matrix: {who: [a, b]}, defenses: [rslad], teacher: $who}\n")
    assert teachers(recipe) == {"a": None, "b": None, "of-a": "a", "of-b": "b"}


def test_steps_read_their_teacher_and_start_from_their_parent() -> None:
    recipe = parse(FAMILY)
    made = plan(recipe)
    fits = {step.variant: step for step in made.steps if step.kind == "fit"}
    keys = {label: step.key for label, step in fits.items()}
    assert (fits["small"].origin, fits["small"].teacher, fits["small"].parents) == (None, keys["big"], (keys["big"],))
    assert fits["other"].parents == (keys["small"], keys["tuned"])
    assert fits["pruned"].teacher is None
    assert fits["pruned"].parents == (keys["small"],)
    assert (fits["same"].origin, fits["same"].teacher, fits["same"].parents) == (
        keys["big"], keys["big"], (keys["big"],)
    )  # fmt: skip
    seen: set[str] = set()
    for step in made.steps:
        assert set(step.parents) <= seen
        seen.add(step.key)


def test_only_a_parent_is_the_surrogate_of_the_checks() -> None:
    made = plan(parse(FAMILY))
    keys = made.fit_keys
    checks = {step.variant: step.parents[2:] for step in made.steps if step.kind == "checks"}
    assert checks["small"] == ()
    assert checks["other"] == (keys["small", 0],)


def test_a_changed_teacher_changes_its_students_and_their_children() -> None:
    before, after = plan(parse(FAMILY)), plan(parse(FAMILY.replace("[n_fgsm]", "[trades]")))
    changed = {label for (label, seed), key in after.fit_keys.items() if key != before.fit_keys[label, seed]}
    assert changed == {"big", "small", "tuned", "other", "plain", "pruned", "heir", "same"}
    after = plan(parse(FAMILY.replace("teacher: tuned", "teacher: big")))
    assert {label for (label, seed), key in after.fit_keys.items() if key != before.fit_keys[label, seed]} == {"other"}


def test_renaming_a_teacher_runs_nothing() -> None:
    before, after = plan(parse(FAMILY)), plan(parse(FAMILY.replace("big", "large")))
    assert {step.key for step in before.steps} == {step.key for step in after.steps}


def test_each_seed_has_its_own_teacher() -> None:
    recipe = parse("  a:\n  b: {teacher: a, defenses: [distill]}\n").model_copy(update={"seeds": (0, 1)})
    made = plan(recipe)
    read = {step.seed: step.teacher for step in made.steps if step.kind == "fit" and step.variant == "b"}
    assert read == {seed: made.fit_keys["a", seed] for seed in (0, 1)}
    assert read[0] != read[1]


MISTAKES = {
    # what: (variants, place in lines from the first variant on, message, hint)
    "no such variant": (
        "  big:\n  a: {teacher: bgi, defenses: [distill]}\n", (2, 16), "there is no variant 'bgi'", "did you mean 'big'"
    ),
    "not a label": (
        "  big:\n  a: {teacher: [big], defenses: [distill]}\n", (2, 16), "`teacher` is the label of one variant", ""
    ),
    "itself": ("  a: {teacher: a, defenses: [ard]}\n", (1, 16), "`teacher` goes in a circle: a -> a", ""),
    "two that teach each other": (
        "  a: {teacher: b, defenses: [ard]}\n  b: {teacher: a, defenses: [ard]}\n",
        (1, 16), "`teacher` goes in a circle: a -> b -> a", "",
    ),
    "a child that teaches its parent": (
        "  a: {teacher: b, defenses: [ard]}\n  b: {from: a, train: {}}\n",
        (1, 16), "`from` and `teacher` go in a circle: a -> b -> a", "",
    ),
    "no teacher": (
        "  big:\n  a: {defenses: [distill]}\n", (2, 17), "distill learns from a teacher, and 'a' has none",
        "add `teacher:` and the label of a variant",
    ),
    "defenses of its own without one": (
        "  big:\n  a: {teacher: big, defenses: [distill]}\n  b: {from: a, train: {}, defenses: [ard]}\n",
        (3, 37), "ard learns from a teacher, and 'b' has none", "add `teacher: big`, as its parent has",
    ),
    "nothing learns": (
        "  big:\n  a: {teacher: big, defenses: [trades]}\n", (2, 16), "no defense of 'a' learns from a teacher",
        "add distill, ard or rslad",
    ),
    "no training": (
        "  big:\n  a: {from: big, teacher: big, compress: [global_l1: {sparsity: 50%}]}\n",
        (2, 27), "a teacher does nothing here: the variant is not trained", "add `train: {}`",
    ),
    "two losses": (
        "  big:\n  a: {teacher: big, defenses: [distill, trades]}\n",
        (2, 31), "distill and trades both own `objective`", "keep one",
    ),
    "a vote": (
        "  big:\n  a: {teacher: big, defenses: [partition_ensemble, distill]}\n",
        (2, 31), "members of partition_ensemble would share a teacher: one poisoned example could", "drop distill",
    ),
    "a norm that ard has not": (
        "  big:\n  a: {teacher: big, threat: {norm: l1, eps: 2}, defenses: [ard]}\nthreat: {eps: 0.1}\n",
        (2, 60), "ard trains against linf or l2; the threat is l1", "change the threat's norm",
    ),
    "a temperature of nothing": (
        "  big:\n  a: {teacher: big, defenses: [distill: {temperature: 0}]}\n", (2, 55), "temperature", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named_with_their_place(what: str) -> None:
    variants, (line, column), message, hint = MISTAKES[what]
    with pytest.raises(RecipeError) as caught:
        parse(variants)
    (problem,) = caught.value.problems
    assert problem.mark is not None
    assert (problem.mark.line - HEAD.count("\n"), problem.mark.column) == (line, column)
    assert message in problem.message
    assert hint in (problem.hint or "")


def test_what_else_is_wrong_with_a_lost_student_is_said_too() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("  a: {from: nobody, teacher: none, train: {epoch: 3}}\n")
    messages = [problem.message for problem in caught.value.problems]
    assert messages == ["there is no variant 'nobody'", "there is no variant 'none'", "unknown key 'epoch'"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=6, max_size=6))
def test_any_tangle_is_put_in_order_or_refused(links: list[tuple[int, int]]) -> None:
    lines = [
        f"  v{number}: {{train: {{}}, from: v{parent}, teacher: v{teacher}, defenses: [distill]}}\n"
        if number
        else "  v0:\n"
        for number, (parent, teacher) in enumerate(links)
    ]

    def ends(number: int, seen: tuple[int, ...] = ()) -> bool:
        """Say whether every way from a variant ends at the one that needs nothing."""
        return not number or (number not in seen and all(ends(one, (*seen, number)) for one in links[number]))

    if all(ends(number) for number in range(6)):
        order = [variant.label for variant in parse("".join(lines)).variants]
        assert sorted(order) == [f"v{number}" for number in range(6)]
        for number, pair in enumerate(links[1:], 1):
            assert all(order.index(f"v{one}") < order.index(f"v{number}") for one in pair)
    else:
        with pytest.raises(RecipeError, match="in a circle"):
            parse("".join(lines))


@pytest.mark.parametrize("named", ["'mine.py:Mine'", "Heir"])
def test_a_defense_of_ones_own_learns_from_a_teacher_too(named: str, tmp_path: Path) -> None:
    source = "from robustkit import Defense\nclass Mine(Defense):\n    def take_teacher(self, teacher): ...\n"
    (tmp_path / "mine.py").write_text(source + "class Heir(Mine): pass\n")
    text = f"  a:\n  b: {{teacher: a, defenses: [{named}]}}\nplugins: [mine.py]\n"
    assert parse(text, tmp_path).variant("b").teacher == "a"
    with pytest.raises(RecipeError, match="learns from a teacher, and 'b' has none"):
        parse(text.replace("teacher: a, ", ""), tmp_path)


def test_a_defense_that_python_registered_learns_from_a_teacher_too() -> None:
    @registry.register("defense", "registered_learner")
    class Learner(Defense):
        def take_teacher(self, teacher: object) -> None: ...

    try:
        assert parse("  a:\n  b: {teacher: a, defenses: [registered_learner]}\n").variant("b").teacher == "a"
        with pytest.raises(RecipeError, match="registered_learner learns from a teacher"):
            parse("  b: {defenses: [registered_learner]}\n")
    finally:
        del registry._registered.objects["defense", "registered_learner"]


def test_check_shows_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + FAMILY)
    assert cli(["check", str(path)]) == 0
    assert "small: distill, teacher big" in capsys.readouterr().out
    assert cli(["check", str(path), "--json"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["variants"]}
    assert rows["small"]["teacher"] == "big"
    assert rows["small"]["parent"] is None
    # Of two epochs: three passes for the student, one for its teacher.
    assert rows["small"]["training_passes"] == 2 * (3 + 1)
    assert rows["pruned"]["training_passes"] == 0


def test_the_schema_knows_teachers() -> None:
    variant = recipe_schema()["properties"]["variants"]["additionalProperties"]["anyOf"][0]
    assert variant["properties"]["teacher"] == {"type": "string"}
