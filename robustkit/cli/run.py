"""`robustkit run`: the main job."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from robustkit.errors import ExitCode, UsageError


@click.command("run", epilog="Example: robustkit run recipes/quickstart.yaml train.epochs=3 seed=[0,1]")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.option("--name", help="Name of the run's folder; default: the recipe's name.")
@click.option("--trust-plugins", is_flag=True, help="Let the recipe run Python code that it names.")
@click.option("--fresh", is_flag=True, help="Forget what the run's folder holds and start again.")
@click.option("--quiet", "-q", is_flag=True, help="Print the table and the report's path only.")
@click.option(
    "--json", "as_json", envvar="ROBUSTKIT_RUN_JSON", is_flag=True, help="Print results.json instead of a table."
)
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    name: str | None,
    trust_plugins: bool,
    fresh: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run RECIPE: train, defend, compress and attack its variants, and write the report.

    OVERRIDES are KEY=VALUE pairs with dotted keys, e.g. train.epochs=3. What the run's folder holds already is not
    done again; a run that was stopped continues where it was.
    """
    from robustkit.recipe.schema import load_recipe

    parsed = load_recipe(recipe, overrides)
    folder = runs / (name or parsed.name)
    out = Console(stderr=as_json, quiet=quiet)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(parsed, recipe, overrides, folder, out, trust_plugins=trust_plugins, fresh=fresh, as_json=as_json)
    except KeyboardInterrupt:
        again = " ".join(_quote(argument) for argument in ["robustkit", *sys.argv[1:]] if argument != "--fresh")
        click.echo(f"interrupted; nothing that was done is lost. To continue:\n  {again}", err=True)
        return int(ExitCode.INTERRUPTED)


def _run(
    parsed: object,
    path: Path,
    overrides: tuple[str, ...],
    folder: Path,
    out: Console,
    *,
    trust_plugins: bool,
    fresh: bool,
    as_json: bool,
) -> int:
    from robustkit import pipeline
    from robustkit.cli.progress import Display
    from robustkit.recipe.spec import Recipe
    from robustkit.report.terminal import failure_lines, print_summary
    from robustkit.store import forget

    assert isinstance(parsed, Recipe)
    pipeline.check_trust(parsed, trust_plugins)
    if fresh:
        forget(folder)
    with Display(out) as display:
        outcome = pipeline.run(
            parsed,
            folder,
            trust_plugins=trust_plugins,
            on_event=display,
            recipe_text=_text(path),
            overrides=overrides,
        )
    if as_json:
        click.echo((folder / "results.json").read_text(encoding="utf-8"))
    else:
        print_summary(outcome.results, Console())
    click.echo(f"report: {outcome.report}", err=as_json)
    for line in failure_lines(outcome.results):
        click.echo(line, err=True)
    if outcome.failures:
        return int(ExitCode.STEP_FAILED)
    return int(ExitCode.OK if all(gate.holds for gate in outcome.results.gates) else ExitCode.GATE_FAILED)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _quote(argument: str) -> str:
    import shlex

    return shlex.quote(argument)
