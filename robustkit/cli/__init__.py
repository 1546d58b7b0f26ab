"""The `robustkit` command. Each subcommand lives in its own module and is imported when it is used."""

from __future__ import annotations

from robustkit.cli.group import main

__all__ = ["main"]
