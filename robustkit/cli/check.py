"""`robustkit check`: a recipe's tree, what is done already, and what the rest costs. Runs nothing, imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.tree import Tree

from robustkit import pipeline, registry
from robustkit.errors import DataError
from robustkit.recipe.cost import attack_passes, training_passes
from robustkit.recipe.plan import Plan, describe_use, describe_variant
from robustkit.recipe.schema import load_recipe
from robustkit.recipe.spec import Recipe, Use, VariantSpec
from robustkit.store import Store


@click.command("check", epilog="Example: robustkit check recipes/fashion-mnist.yaml train.epochs=3")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.option("--name", help="Name of the run's folder; default: the recipe's name.")
@click.option("--json", "as_json", envvar="ROBUSTKIT_CHECK_JSON", is_flag=True, help="Print JSON.")
def command(recipe: Path, overrides: tuple[str, ...], runs: Path, name: str | None, as_json: bool) -> None:
    """Check RECIPE and show its variants as a tree, what is done, and the cost in passes over an image."""
    parsed = load_recipe(recipe, overrides)
    missing = None
    try:
        plan: Plan | None = pipeline.plan_of(parsed)
    except DataError as error:
        plan, missing = None, str(error)
    store = Store(runs / (name or parsed.name))
    rows = [_row(parsed, variant, plan, store) for variant in parsed.variants]
    if as_json:
        click.echo(json.dumps({"name": parsed.name, "variants": rows, "data_problem": missing}, indent=2))
    else:
        _print(parsed, rows, Console(), missing)
    if missing is not None:
        raise DataError(missing)


def _row(recipe: Recipe, variant: VariantSpec, plan: Plan | None, store: Store) -> dict[str, Any]:
    def parameter(kind: str, use: Use, name: str) -> object:
        if name in use.parameters:
            return use.parameters[name]
        known = registry.parameters(pipeline.entry_of(kind, use, recipe))
        return next((one.default for one in known if one.name == name), None)

    steps = [step for seed in recipe.seeds for step in plan.of(variant.label, seed)] if plan else []
    state = Counter("done" if store.done(step.key) else "to run" for step in steps)
    return {
        "variant": variant.label,
        "parent": variant.parent,
        "what": describe_variant(variant),
        "done": state["done"],
        "to_run": state["to run"],
        "training_passes": training_passes(variant, parameter),
        "attack_passes": attack_passes(recipe, parameter),
    }


def _print(recipe: Recipe, rows: list[dict[str, Any]], console: Console, missing: str | None) -> None:
    attacks = ", ".join(describe_use(use) for use in recipe.evaluate.attacks) or "none"
    threat = f"{recipe.threat.norm} eps {recipe.threat.eps:.4g}"
    tree = Tree(f"{recipe.name}: {recipe.data.name}, {threat}, seeds {', '.join(map(str, recipe.seeds))}")
    branches: dict[str, Tree] = {}
    for row in rows:
        above = branches[row["parent"]] if row["parent"] else tree
        branches[row["variant"]] = above.add(_describe(row, missing))
    console.print(tree, highlight=False, markup=False)
    console.print(f"attacks: {attacks}", highlight=False, markup=False, soft_wrap=True)
    train = sum(row["training_passes"] for row in rows) * len(recipe.seeds)
    attack = sum(row["attack_passes"] for row in rows) * len(recipe.seeds)
    console.print(
        f"cost: training {train:,.0f} passes over each training image, "
        f"attacks at most {attack:,.0f} over each test image",
        highlight=False,
        markup=False,
    )


def _describe(row: dict[str, Any], missing: str | None) -> str:
    if missing is not None:
        state = "data missing"
    elif not row["to_run"]:
        state = "done before"
    else:
        state = f"{row['to_run']} to run" + (f", {row['done']} done" if row["done"] else "")
    passes = f", {row['training_passes']:,.0f} passes" if row["training_passes"] else ", no training"
    return f"{row['variant']}: {row['what']}{passes} [{state}]"
