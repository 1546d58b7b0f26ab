"""`robustkit check`: a recipe's tree, what is done, and what the rest costs. Trains nothing, imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.tree import Tree

from robustkit import pipeline, registry
from robustkit.errors import DataError, NotDownloaded
from robustkit.recipe.cost import artefact_passes, attack_passes, autoattack_passes, parameter_of, training_passes
from robustkit.recipe.facts import facts_of
from robustkit.recipe.plan import Plan, describe_use, describe_variant
from robustkit.recipe.schema import load_recipe
from robustkit.recipe.spec import Recipe, VariantSpec
from robustkit.store import Store


@click.command("check", epilog="Example: robustkit check recipes/fashion-mnist.yaml train.epochs=3")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.option("--name", help="Name of the run's folder; default: the recipe's name.")
@click.option("--trust-plugins", is_flag=True, help="Let a data source of yours run, to see what is done already.")
@click.option("--json", "as_json", envvar="ROBUSTKIT_CHECK_JSON", is_flag=True, help="Print JSON.")
def command(
    recipe: Path, overrides: tuple[str, ...], runs: Path, name: str | None, trust_plugins: bool, as_json: bool
) -> None:
    """Check RECIPE and show its variants as a tree, what is done, and the cost in passes over an image."""
    parsed = load_recipe(recipe, overrides)
    data = _look(parsed, trust_plugins)
    store = Store(runs / (name or parsed.name))
    rows = [_row(parsed, variant, data.plan, store) for variant in parsed.variants]
    if as_json:
        shown = {"name": parsed.name, "variants": rows, "data_problem": data.problem, "data_note": data.note}
        click.echo(json.dumps(shown, indent=2))
    else:
        _print(parsed, rows, Console(), data)
    if data.problem is not None:
        raise DataError(data.problem)


@dataclass(frozen=True)
class Data:
    """What is known of a recipe's data: a plan on them, or in a word and in a sentence why there is none."""

    plan: Plan | None = None
    state: str = ""
    note: str | None = None
    problem: str | None = None
    """What is wrong with the data; a note without a problem is no mistake."""


def _look(recipe: Recipe, trust_plugins: bool) -> Data:
    if registry.runs_user_code(pipeline.entry_of("data", recipe.data, recipe)) and not trust_plugins:
        note = (
            f"not read, as that would run {recipe.data.name}; if you trust that code, add --trust-plugins to see "
            "what is done already"
        )
        return Data(state="not known", note=note)
    try:
        return Data(pipeline.plan_of(recipe, fetch=False))
    except NotDownloaded as error:
        return Data(state="data to be downloaded", note=str(error))
    except DataError as error:
        return Data(state="data missing", problem=str(error))


def _row(recipe: Recipe, variant: VariantSpec, plan: Plan | None, store: Store) -> dict[str, Any]:
    parameter = parameter_of(recipe)
    # Without a plan nothing is known, which is not the same as nothing to do.
    steps = [step for seed in recipe.seeds for step in plan.of(variant.label, seed)] if plan else []
    state = Counter("done" if store.done(step.key) else "to run" for step in steps)
    return {
        "variant": variant.label,
        "parent": variant.parent,
        "teacher": variant.teacher,
        "what": describe_variant(variant),
        "done": state["done"] if plan else None,
        "to_run": state["to run"] if plan else None,
        "training_passes": training_passes(variant, parameter),
        "attack_passes": attack_passes(recipe, parameter) + artefact_passes(variant),
    }


def _print(recipe: Recipe, rows: list[dict[str, Any]], console: Console, data: Data) -> None:
    attacks = ", ".join(describe_use(use) for use in recipe.evaluate.attacks) or "none"
    threat = f"{recipe.threat.norm} eps {recipe.threat.eps:.4g}"
    tree = Tree(f"{recipe.name}: {recipe.data.name}, {threat}, seeds {', '.join(map(str, recipe.seeds))}")
    branches: dict[str, Tree] = {}
    for row in rows:
        above = branches[row["parent"]] if row["parent"] else tree
        branches[row["variant"]] = above.add(_describe(row, data.state))
    console.print(tree, highlight=False, markup=False)
    if data.note is not None:
        console.print(f"data: {data.note}", highlight=False, markup=False, soft_wrap=True)
    if recipe.poison is not None:
        line = f"poison: {describe_use(recipe.poison)} in the training data"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"attacks: {attacks}", highlight=False, markup=False, soft_wrap=True)
    for line in _beside(recipe):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    train = sum(row["training_passes"] for row in rows) * len(recipe.seeds)
    attack = sum(row["attack_passes"] for row in rows) * len(recipe.seeds)
    audited = autoattack_passes(facts_of(recipe).classes, recipe.threat.norm) * len(rows) * len(recipe.seeds)
    console.print(
        f"cost: training {train:,.0f} passes over each training image, "
        f"evaluation at most {attack:,.0f} over each test image "
        f"(AutoAttack alone: {audited:,.0f})",
        highlight=False,
        markup=False,
    )


def _beside(recipe: Recipe) -> list[str]:
    """Return what is measured beside the attacks, and how their results are judged."""
    evaluate = recipe.evaluate
    certificates = ", ".join(describe_use(use) for use in evaluate.certify)
    lines = [f"certificates: {certificates}"] if certificates else []
    lines += ["corruptions: all, at 5 severities"] if evaluate.corruptions else []
    lines += [f"audit: AutoAttack on {evaluate.audit} survivors of each variant"] if evaluate.audit else []
    return lines + (["adversarial images: rounded to 8 bits"] if evaluate.quantize_input else [])


def _describe(row: dict[str, Any], unknown: str) -> str:
    if unknown:
        state = unknown
    elif not row["to_run"]:
        state = "done before"
    else:
        state = f"{row['to_run']} to run" + (f", {row['done']} done" if row["done"] else "")
    passes = f", {row['training_passes']:,.0f} passes" if row["training_passes"] else ", no training"
    return f"{row['variant']}: {row['what']}{passes} [{state}]"
