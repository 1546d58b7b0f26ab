"""`robustkit list`: the plugins of every kind."""

from __future__ import annotations

import json

import click

from robustkit import registry
from robustkit.errors import UsageError, did_you_mean


@click.command("list", epilog="Example: robustkit list attack")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(kind: str | None, as_json: bool) -> None:
    """List the plugins of every KIND: data, model, defense, compressor, attack, optimizer, schedule, augmentation."""
    if kind is not None and kind not in registry.KINDS:
        raise UsageError(f"unknown kind {kind!r}; {did_you_mean(kind, registry.KINDS) or ', '.join(registry.KINDS)}")
    kinds = [one for one in registry.KINDS if kind in (None, one)]
    found = {one: {name: registry.summary(registry.find(one, name)) for name in _names(one)} for one in kinds}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for one, entries in found.items():
        click.secho(one, bold=True)
        for name, summary in entries.items():
            click.echo(f"  {name:24} {summary}".rstrip())
        if one == "model":
            click.echo(
                f"  {'torchvision.<name>':24} Any of torchvision's {len(registry.torchvision_files())} classifiers."
            )
        click.echo()
    click.echo("Your own: file.py:Class, package.module:Class, @robustkit.register, or an entry point.")


def _names(kind: registry.Kind) -> list[str]:
    found = list(registry.names(kind))
    if kind == "attack":
        found += [f"torchattacks.{name}" for name in sorted(registry.torchattacks_files())]
    return found
