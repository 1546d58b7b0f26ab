"""The command group: commands imported on first use, errors shown as messages with an exit code."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from robustkit import __version__
from robustkit.errors import ExitCode, RobustkitError

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("robustkit.cli.run", "Run a recipe: train, defend, compress, attack, report."),
    "check": ("robustkit.cli.check", "Check a recipe; show its tree, what is done, what it costs."),
    "list": ("robustkit.cli.list", "List the plugins of every kind."),
    "show": ("robustkit.cli.show", "Show one plugin: what it does and its parameters."),
    "init": ("robustkit.cli.init", "Write a commented starter recipe."),
    "report": ("robustkit.cli.report", "Write the report of a run again."),
    "compare": ("robustkit.cli.compare", "Compare the variants of several runs."),
    "table": ("robustkit.cli.table", "Print chosen metrics of a run as Markdown, LaTeX or CSV."),
    "attack": ("robustkit.cli.attack", "Attack a model file on a data set; print accuracies, flags and a verdict."),
    "export": ("robustkit.cli.export", "Write a variant's model as safetensors, ONNX or pt2, checked on test images."),
    "sensitivity": ("robustkit.cli.sensitivity", "Show how much pruning each layer of a variant bears."),
    "schema": ("robustkit.cli.schema", "Print the JSON schema of recipes."),
    "env": ("robustkit.cli.env", "Show versions, devices and folders."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is used, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"auto_envvar_prefix": "ROBUSTKIT", "help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 a step failed, 2 usage or recipe, 3 a gate failed, 130 interrupted. "
    "Every option can be set by ROBUSTKIT_<COMMAND>_<OPTION>. Shell completion: see docs/cli.md.",
)
@click.version_option(__version__, prog_name="robustkit")
def cli() -> None:
    """Train, defend, compress and attack image classifiers, and compare them side by side."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code; a mistake ends in a message, never in a traceback."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code: Any = cli.main(args=args, prog_name="robustkit", standalone_mode=False)
    except RobustkitError as error:
        click.echo(f"error: {error}", err=True)
        return int(error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    except OSError as error:
        click.echo(f"error: {_told(error)}", err=True)
        return int(ExitCode.STEP_FAILED)
    return int(code) if isinstance(code, int) else int(ExitCode.OK)


def _told(error: OSError) -> str:
    """Return which file an error of the system is about, and what it says."""
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {error.strerror or error}" if files else str(error)
