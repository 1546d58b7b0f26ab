"""`robustkit show`: one plugin."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robustkit import registry
from robustkit.errors import UsageError, did_you_mean


@click.command("show", epilog="Example: robustkit show pgd")
@click.argument("name")
@click.option("--json", "as_json", envvar="ROBUSTKIT_SHOW_JSON", is_flag=True, help="Print JSON.")
def command(name: str, as_json: bool) -> None:
    """Show the plugin NAME: its kind, what it does, where it lives, its parameters."""
    entries = _entries(name)
    if as_json:
        click.echo(json.dumps([_record(entry) for entry in entries], indent=2, default=str))
        return
    for entry in entries:
        click.secho(f"{entry.name}  ({entry.kind}, {entry.origin})", bold=True)
        click.echo(f"  {registry.summary(entry)}")
        for parameter in registry.parameters(entry):
            default = "required" if parameter.required else f"default {parameter.default!r}"
            click.echo(f"  {parameter.name:22} {parameter.annotation:28} {default}")
        click.echo(f"  source: {entry.file}")


def _entries(name: str) -> list[registry.Entry]:
    found, reasons = [], []
    for kind in registry.KINDS:
        try:
            found.append(registry.find(kind, name, folder=Path.cwd()))
        except UsageError as error:
            reasons.append(str(error).removeprefix(f"{kind} "))
    if found:
        return found
    if ":" in name:
        # A file or module is looked into alike for every kind, so that the first reason is everyone's.
        raise UsageError(reasons[0])
    known = [one for kind in registry.KINDS for one in registry.names(kind)]
    known += [f"torchattacks.{one}" for one in registry.torchattacks_files()]
    raise UsageError(f"there is no plugin {name!r}; {did_you_mean(name, known) or '`robustkit list` shows all'}")


def _record(entry: registry.Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "origin": entry.origin,
        "summary": registry.summary(entry),
        "source": str(entry.file),
        "parameters": [
            {
                "name": one.name,
                "type": one.annotation,
                "required": one.required,
                **({} if one.required else {"default": one.default}),
            }
            for one in registry.parameters(entry)
        ],
    }
