"""`robustkit schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import json

import click

from robustkit.recipe.jsonschema import recipe_schema


@click.command("schema")
def command() -> None:
    """Print the JSON schema of recipes; an editor with YAML support completes and checks by it."""
    click.echo(json.dumps(recipe_schema(), indent=2))
