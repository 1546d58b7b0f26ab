"""`robustkit env`: versions, devices and folders, for a bug report."""

from __future__ import annotations

import json

import click


@click.command("env")
@click.option("--json", "as_json", envvar="ROBUSTKIT_ENV_JSON", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show versions, processor, devices and the folders that robustkit uses."""
    import torch

    from robustkit import provenance
    from robustkit.data.cache import cache_folder

    found = provenance.collect(command=[])
    found.pop("command")
    found["cache"] = str(cache_folder())
    found["cuda"] = torch.cuda.is_available()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        click.echo(f"{key:10} {_line(value)}")


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "none"
    return "-" if value is None else str(value)
