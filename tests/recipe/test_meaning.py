"""What a recipe means: numbers, overrides, matrices, inheritance, labels, seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.errors import RecipeError
from robustkit.params import parse_number
from robustkit.recipe.jsonschema import recipe_schema
from robustkit.recipe.schema import load_recipe, parse_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
BASE = "data: digits\nmodel: small_cnn\nvariants:\n  baseline:\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("80%", 0.8), ("1e-3", 1e-3), (" 0.5 ", 0.5), ("-2", -2.0), (".25", 0.25), ("5 %", 0.05)],
)
def test_numbers(text: str, value: float) -> None:
    assert parse_number(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("text", ["", "eight", "1/0", "1/2/3", "0x10", "1e", "nan", "inf", "1,5", "8 /", "%"])
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@given(above=st.integers(0, 255), below=st.integers(1, 255))
def test_fractions_are_exact(above: int, below: int) -> None:
    assert parse_number(f"{above}/{below}") == above / below


def test_numbers_in_a_recipe() -> None:
    recipe = parse_recipe(
        BASE + "  a: {from: baseline, compress: [global_l1: {sparsity: 80%}]}\n"
        "threat: {norm: l2, eps: 128/255}\ntrain: {optimizer: {sgd: {lr: 1e-3}}, validation: 5%}\n"
        "evaluate: {eps_curve: [0, 64/255, 0.5]}\n"
    )
    assert recipe.threat.eps == 128 / 255
    assert recipe.variant("a").compress[0].parameters["sparsity"] == 0.8
    train = recipe.variant("baseline").train
    assert train is not None
    assert train.optimizer.parameters["lr"] == 1e-3
    assert train.validation == 0.05
    assert recipe.evaluate.eps_curve == (0.0, 64 / 255, 0.5)


def test_an_l2_threat_may_be_longer_than_one_pixel() -> None:
    assert parse_recipe(BASE + "threat: {norm: l2, eps: 2}\n").threat.eps == 2.0


def test_a_child_inherits_defenses_and_overrides_training() -> None:
    recipe = parse_recipe(
        BASE + "  hard: {defenses: [n_fgsm, dropout: {p: 0.2}]}\n"
        "  small: {from: hard, compress: [layer_l1: {sparsity: 0.5}], train: {epochs: 2}}\n"
        "  plain: {from: hard, defenses: [], compress: [random: {sparsity: 0.5}], train: {epochs: 2}}\n"
        "  masked: {from: small, compress: [global_l1: {sparsity: 0.9}]}\n"
        "train: {epochs: 7, batch_size: 32}\n"
    )
    small, plain, masked = (recipe.variant(label) for label in ("small", "plain", "masked"))
    assert [use.name for use in small.defenses] == ["n_fgsm", "dropout"]
    assert small.train is not None
    assert (small.train.epochs, small.train.batch_size) == (2, 32)
    assert plain.defenses == ()
    assert masked.train is None
    assert masked.parent == "small"


def test_children_may_stand_before_their_parents() -> None:
    text = "  child: {from: parent, train: {epochs: 1}}\n  parent:\n"
    labels = [one.label for one in parse_recipe(BASE + text).variants]
    assert labels.index("parent") < labels.index("child")


def test_a_matrix_makes_every_combination() -> None:
    recipe = parse_recipe(
        BASE + "  hard: {defenses: [n_fgsm]}\n  $base-$percent-${how}:\n"
        "    matrix: {base: [baseline, hard], percent: [50, 80], how: [global_l1, random]}\n"
        "    from: $base\n    compress: [$how: {sparsity: $percent%}]\n"
    )
    made = {one.label: one for one in recipe.variants}
    assert len(made) == 2 + 8
    one = made["hard-80-random"]
    assert (one.parent, one.compress[0].name, one.compress[0].parameters["sparsity"]) == ("hard", "random", 0.8)


def test_labels_tell_uses_of_one_attack_apart() -> None:
    recipe = parse_recipe(BASE + "evaluate: {attacks: [pgd, pgd: {steps: 50, as: pgd-50}]}\n")
    assert [(use.name, use.label) for use in recipe.evaluate.attacks] == [("pgd", "pgd"), ("pgd", "pgd-50")]
    with pytest.raises(RecipeError, match="two uses with the label 'pgd'"):
        parse_recipe(BASE + "evaluate: {attacks: [pgd, pgd: {steps: 50}]}\n")


def test_seeds() -> None:
    assert parse_recipe(BASE).seeds == (0,)
    assert parse_recipe(BASE + "seed: [3, 1, 4]\n").seeds == (3, 1, 4)
    with pytest.raises(RecipeError):
        parse_recipe(BASE + "seed: [1, 1]\n")


def test_overrides_reach_names_with_dots() -> None:
    recipe = parse_recipe(
        BASE + "  v1.5: {defenses: [mine.py:Mine]}\n  v1: {train: {epochs: 9}}\n"
        "evaluate: {attacks: [torchattacks.Square, pgd, torchattacks.PGD: {steps: 5}]}\n",
        overrides=[
            "variants.v1.5.defenses=[n_fgsm]",
            "variants.v1.train.epochs=4",
            "evaluate.attacks.0.torchattacks.Square.n_queries=5",
            "evaluate.attacks.1.pgd.steps=3",
            "evaluate.attacks.2.torchattacks.PGD.steps=7",
            "model.torchvision.resnet18={}",
        ],
    )
    assert [use.name for use in recipe.variant("v1.5").defenses] == ["n_fgsm"]
    train = recipe.variant("v1").train
    assert train is not None
    assert train.epochs == 4
    assert [use.parameters for use in recipe.evaluate.attacks] == [{"n_queries": 5}, {"steps": 3}, {"steps": 7}]
    assert recipe.variant("v1").model.name == "torchvision.resnet18"


def test_overrides_name_another_plugin_where_one_stood_by_its_bare_name() -> None:
    recipe = parse_recipe(BASE, overrides=["model.baseline_cnn.batch_norm=true"])
    assert recipe.variant("baseline").model.name == "baseline_cnn"
    assert recipe.variant("baseline").model.parameters == {"batch_norm": True}
    with pytest.raises(RecipeError, match=r"evaluate.attacks.0 is 'fgsm', not 'pgd'"):
        parse_recipe(BASE + "evaluate: {attacks: [fgsm, pgd]}\n", overrides=["evaluate.attacks.0.pgd.steps=3"])


def test_overrides() -> None:
    recipe = parse_recipe(
        BASE + "train: {optimizer: sgd}\n",
        overrides=[
            "train.epochs=3",
            "train.optimizer.sgd.lr=1e-2",
            "threat.eps=4/255",
            "variants.baseline.defenses=[n_fgsm, label_smoothing: {amount: 10%}]",
            "data.digits.size=12",
            "evaluate.examples=100",
        ],
    )
    baseline = recipe.variant("baseline")
    assert baseline.train is not None
    assert baseline.train.epochs == 3
    assert baseline.train.optimizer.parameters["lr"] == 0.01
    assert recipe.threat.eps == 4 / 255
    assert [use.name for use in baseline.defenses] == ["n_fgsm", "label_smoothing"]
    assert recipe.data.parameters == {"size": 12}
    assert recipe.evaluate.examples == 100


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "="),
        ("train.epohcs=3", "epochs"),
        ("train.epochs=three", "epochs"),
        ("threat.eps=8", "8/255"),
        ("train.epochs=[1", "train.epochs"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE, overrides=[override])
    assert message in str(caught.value)
    assert override in str(caught.value) or "override" in str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_comes_along_is_whole(path: Path) -> None:
    assert load_recipe(path).variants


def test_the_json_schema_covers_every_recipe_that_comes_along() -> None:
    """Keys only: the schema leaves values to the plugins' own checks."""
    schema = json.loads(json.dumps(recipe_schema()))
    from ruamel.yaml import YAML

    for path in RECIPES.rglob("*.yaml"):
        recipe = YAML(typ="safe", pure=True).load(path)
        assert set(recipe) <= set(schema["properties"])
        assert set(recipe.get("train", {})) <= set(schema["properties"]["train"]["properties"])
        assert set(recipe.get("evaluate", {})) <= set(schema["properties"]["evaluate"]["properties"])
    known = schema["properties"]["model"]["anyOf"][1]["properties"]
    assert "widths" in known["small_cnn"]["anyOf"][0]["properties"]


def test_reading_a_recipe_and_planning_import_no_torch() -> None:
    code = (
        "import sys\nfrom robustkit.recipe.schema import load_recipe\nfrom robustkit.pipeline import plan_of\n"
        f"plan_of(load_recipe({str(RECIPES / 'quickstart.yaml')!r}))\n"
        "assert not {'torch', 'torchvision', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
