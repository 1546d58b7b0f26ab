"""`robustkit list`: the plugins of every kind."""

from __future__ import annotations

import json

import click

from robustkit import registry
from robustkit.attacks.torchattacks_table import PROFILES
from robustkit.errors import UsageError, did_you_mean


@click.command("list", epilog="Example: robustkit list attack")
@click.argument("kind", required=False)
@click.option("--json", "as_json", envvar="ROBUSTKIT_LIST_JSON", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables with the parameters.")
def command(kind: str | None, as_json: bool, markdown: bool) -> None:
    """List the plugins of every KIND: data, model, defense, attack, certificate and so on; without one, of all."""
    if kind is not None and kind not in registry.KINDS:
        raise UsageError(f"unknown kind {kind!r}; {did_you_mean(kind, registry.KINDS) or ', '.join(registry.KINDS)}")
    kinds = [one for one in registry.KINDS if kind in (None, one)]
    if markdown:
        click.echo("\n".join(_markdown(one) for one in kinds), nl=False)
        return
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


def _markdown(kind: registry.Kind) -> str:
    """Return a table of a kind's plugins: name, parameters with types and defaults, what it does."""
    lines = [f"## {kind}", "", "| name | parameters | what it does |", "|---|---|---|"]
    for name in _names(kind):
        entry = registry.find(kind, name)
        cells = (f"`{name}`", _signature(entry), _what(entry))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _what(entry: registry.Entry) -> str:
    if entry.origin != "torchattacks":
        return registry.summary(entry)
    profile = PROFILES[entry.attribute]
    limits = [profile.refused and f"refused: {profile.refused}", *profile.notes, f"{'/'.join(profile.norms)} only"]
    text = "; ".join(limit for limit in limits if limit)
    return f"{registry.summary(entry).rstrip('.')}. *{text}*"


def _signature(entry: registry.Entry) -> str:
    parts = []
    for one in registry.parameters(entry):
        default = "" if one.required else f" = {one.default}"
        parts.append(f"`{one.name}: {one.annotation}{default}`" if one.annotation else f"`{one.name}{default}`")
    return ", ".join(parts)


def _names(kind: registry.Kind) -> list[str]:
    found = list(registry.names(kind))
    if kind == "attack":
        found += [f"torchattacks.{name}" for name in sorted(registry.torchattacks_files())]
    return found
